// The inside of Tokenizer, for the files that implement it.
#pragma once

#include <chat.h>
#include <llama.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "base/access.h"
#include "narrows/text.h"
#include "text/special_tokens.h"
#include "text/vocabulary.h"

namespace narrows {

struct Tokenizer::Impl {
  struct ModelFree {
    void operator()(llama_model* model) const { llama_model_free(model); }
  };

  std::unique_ptr<llama_model, ModelFree> model;  ///< vocabulary only
  const llama_vocab* vocab = nullptr;
  int32_t n_vocab = 0;
  int64_t max_token_bytes = 0;  ///< see Tokenizer
  SpecialTokens special;
  bool has_template = false;
  common_chat_templates_ptr templates;  ///< null if the file has none, or one that does not parse
  std::string template_error;           ///< why it does not parse
  /// What the template knows.
  struct {
    bool tools = false;
    bool parallel_calls = false;
    bool object_arguments = false;
    bool effort = false;
  } template_caps;
  mutable std::once_flag thinks_once;
  mutable bool thinks = false;  ///< it has a place for thinking
  /// Beside the messages, as JSON; enable_thinking, which llama.cpp knows by itself, apart from the others.
  std::map<std::string, std::string> template_arguments;
  bool enable_thinking = true;
  mutable std::once_flag pieces_once;
  mutable std::unique_ptr<SortedPieces> pieces;  ///< see sorted_pieces()

  /// A template that does not parse spoils chat, not the model: the error waits for apply_chat_template().
  void read_template();
  void use_template(const std::string& source);
  /// What options say in its place. invalid_argument.
  Status take(const ChatTemplateOptions& options);
};

/// The line that says what is wrong: Jinja draws the template over many lines and ends with "Error: ..."; a
/// parser's error begins with its reason.
std::string reason_in(std::string_view text);

}  // namespace narrows
