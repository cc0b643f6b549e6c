// One prompt in, one answer out: prefill, then sample and decode until something says stop. Shared by the
// single run and the chat.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cli/exit_code.h"
#include "narrows/engine.h"
#include "narrows/sampling.h"

namespace narrows::cli {

enum class StopReason {
  end_of_text,   ///< the model ended its answer
  token_limit,   ///< -n reached
  context_full,  ///< the cache holds n_ctx tokens
  interrupted,   ///< Ctrl-C
  told_to_end,   ///< SIGTERM or SIGHUP
};

struct Answer {
  std::string text;  ///< what was shown: always UTF-8
  std::string
      cached_text;       ///< bytes of the generated tokens that are in the cache, special tokens written out
  std::string all_text;  ///< the same of all generated tokens
  std::vector<Token> tokens_in_cache;  ///< generated ones
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;  ///< of them in the cache before
  int64_t generated_tokens = 0;
  int64_t decode_steps =
      0;                 ///< tokens computed after the prompt; at most one more or less than were generated
  double prefill_s = 0;  ///< until the first logits
  double decode_s = 0;   ///< sampling and decoding, without the time that writing took
  StopReason stop = StopReason::end_of_text;
};

struct GenerateOptions {
  std::optional<int64_t> max_tokens;  ///< nothing: until the model ends or the context is full
  int64_t n_cached = 0;               ///< tokens of the prompt that the session holds already
  std::function<Status(std::string_view text)> show;  ///< called with whole characters as they come
  std::function<void()> prompt_read = [] {};          ///< called before the answer
};

/// Runs the prompt, but for its first n_cached tokens, on top of what the session holds. The phase of a
/// failure tells a prompt that does not fit (before_work, the session is untouched) from one on the way (the
/// session needs a reset).
Outcome generate(Session& session, Sampler& sampler, std::span<const Token> prompt,
                 const GenerateOptions& options, Answer& answer);

}  // namespace narrows::cli
