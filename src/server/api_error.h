// What a failed request is answered with: the one table from Status to HTTP code and OpenAI's error type.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "narrows/status.h"

namespace narrows::server {

/// What a failure means over HTTP beyond its Status.
struct ApiError {
  int http_code = 500;
  std::string type;     ///< as in OpenAI's replies: "invalid_request_error", ...
  std::string message;  ///< one sentence
  std::string param;    ///< the field of the request that is wrong; "" if none
  /// Of a prompt that does not fit (type exceed_context_size_error).
  std::optional<int64_t> n_prompt_tokens;
  std::optional<int64_t> n_ctx;
};

/// The table. A cancelled request is 499, as nobody is there to read it.
ApiError to_api_error(const Status& status);

ApiError bad_request(std::string message, std::string param = {});
/// The prompt is longer than the context.
ApiError context_exceeded(int64_t n_prompt_tokens, int64_t n_ctx);
/// Errors of HTTP itself: 401 no or wrong key, 404 no such path, 405, 413, 415, 429 (queue full), 503.
ApiError http_error(int code, std::string message);

/// {"error": {...}} in one line.
std::string to_json(const ApiError& error);

}  // namespace narrows::server
