#include "server/prompt_tokens.h"

#include <algorithm>

namespace narrows::server {

namespace {

constexpr size_t kFirstPiece = size_t{64} << 10;
/// More than text of most languages has for a token.
constexpr size_t kUsualBytes = 8;

/// A place at or before `at` where a character begins.
size_t character_begin(std::string_view text, size_t at) {
  while (at > 0 && at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0U) == 0x80U) --at;
  return at;
}

}  // namespace

std::optional<ApiError> refuse_bytes(const Tokenizer& tokenizer, size_t bytes, const TokenLimits& limits) {
  const int64_t longest = tokenizer.max_token_bytes();
  if (longest == 0) return std::nullopt;
  const int64_t least = static_cast<int64_t>(bytes) / longest;
  if (least <= limits.n_ctx) return std::nullopt;
  return context_exceeded(least, limits.n_ctx);
}

std::optional<std::vector<Token>> tokens_within(const Tokenizer& tokenizer, const ChatPrompt& prompt,
                                                const TokenLimits& limits, ApiError& error) {
  if (const auto refused = refuse_bytes(tokenizer, prompt.text.size(), limits)) {
    error = *refused;
    return std::nullopt;
  }
  const auto n_ctx = static_cast<size_t>(limits.n_ctx);
  // Beginnings of the text, each twice as long: where one has twice the tokens that fit, the whole does not.
  size_t piece = std::max(kFirstPiece, n_ctx * kUsualBytes);
  for (;; piece *= 2) {
    if (limits.given_up) {
      if (const std::optional<ApiError> end = limits.given_up()) {
        error = *end;
        return std::nullopt;
      }
    }
    const bool whole = piece >= prompt.text.size() / 2;
    Result<std::vector<Token>> tokens = [&] {
      if (whole) return tokenizer.encode(prompt);
      ChatPrompt part;
      part.text = prompt.text.substr(0, character_begin(prompt.text, piece));
      part.breaks.assign(prompt.breaks.begin(),
                         std::lower_bound(prompt.breaks.begin(), prompt.breaks.end(), part.text.size()));
      return tokenizer.encode(part);
    }();
    if (!tokens.ok()) {
      error = to_api_error(tokens.status());
      return std::nullopt;
    }
    if (whole) return std::move(*tokens);
    if (tokens->size() > 2 * n_ctx + 1000) {
      error = context_exceeded(static_cast<int64_t>(tokens->size()), limits.n_ctx);
      return std::nullopt;
    }
  }
}

}  // namespace narrows::server
