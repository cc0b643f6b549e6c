// Texts to tokens within what the context can hold: libllama takes some hundred bytes of memory for each byte
// of a text, so one that cannot fit is refused before all of it is cut into tokens.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "narrows/text.h"
#include "server/api_error.h"

namespace narrows::server {

struct TokenLimits {
  int64_t n_ctx = 0;
  /// Asked between pieces of the work: an error ends it (the client left, the server ends).
  std::function<std::optional<ApiError>()> given_up;
};

/// Refuses texts of so many bytes together that no n_ctx tokens can hold them.
std::optional<ApiError> refuse_bytes(const Tokenizer& tokenizer, size_t bytes, const TokenLimits& limits);

/// As Tokenizer::encode(prompt). Nothing: error says why; n_prompt_tokens in it may be less than the whole
/// text has, and is more than n_ctx.
std::optional<std::vector<Token>> tokens_within(const Tokenizer& tokenizer, const ChatPrompt& prompt,
                                                const TokenLimits& limits, ApiError& error);

}  // namespace narrows::server
