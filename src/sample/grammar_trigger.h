// Where in an answer a grammar begins to hold: at one of some words or patterns, unless the model is
// thinking.
#pragma once

#include <optional>
#include <regex>
#include <string>
#include <string_view>
#include <vector>

#include "narrows/sampling.h"
#include "narrows/status.h"

namespace narrows {

class GrammarTrigger {
 public:
  /// invalid_argument if a pattern is no ECMAScript expression.
  static Result<GrammarTrigger> create(const SamplerOptions& options);

  /// Adds text of the answer. Its end from where the grammar holds, once it has come to that.
  std::optional<std::string> push(std::string_view piece);

 private:
  std::optional<size_t> find_begin() const;
  bool follow_thinking();

  std::vector<std::string> words_;
  std::vector<std::regex> patterns_;
  std::vector<std::regex> patterns_from_start_;
  std::string thinking_begin_;
  std::vector<std::string> thinking_ends_;
  bool thinking_ = false;
  size_t n_kept_ = 0;     ///< bytes of the answer's end that may matter yet
  bool is_start_ = true;  ///< kept_ is all of the answer
  std::string kept_;
};

}  // namespace narrows
