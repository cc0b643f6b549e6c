#include "server/api_error.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

namespace narrows::server {

namespace {

const char* type_of(int http_code) {
  switch (http_code) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    case 499:
      return "cancelled_error";
    case 501:
      return "not_supported_error";
    case 503:
      return "unavailable_error";
    default:
      return http_code < 500 ? "invalid_request_error" : "server_error";
  }
}

}  // namespace

ApiError http_error(int code, std::string message) {
  ApiError e;
  e.http_code = code;
  e.type = type_of(code);
  e.message = std::move(message);
  return e;
}

ApiError to_api_error(const Status& status) {
  const auto code = [&] {
    switch (status.code()) {
      case StatusCode::invalid_argument:
      case StatusCode::invalid_file:
      case StatusCode::context_full:
        return 400;
      case StatusCode::cancelled:
        return 499;
      case StatusCode::unsupported:
        return 501;
      case StatusCode::out_of_memory:
        return 503;
      case StatusCode::disk_full:
        return 507;
      case StatusCode::ok:
      case StatusCode::io_error:
      case StatusCode::non_finite:
      case StatusCode::internal:
        return 500;
    }
    return 500;
  };
  ApiError e = http_error(code(), status.message());
  if (status.code() == StatusCode::context_full) e.type = "exceed_context_size_error";
  if (status.code() == StatusCode::out_of_memory) e.type = "out_of_memory_error";
  return e;
}

ApiError bad_request(std::string message, std::string param) {
  ApiError e = http_error(400, std::move(message));
  e.param = std::move(param);
  return e;
}

ApiError context_exceeded(int64_t n_prompt_tokens, int64_t n_ctx) {
  ApiError e = http_error(
      // Clients know this fault by the first words, which are OpenAI's.
      400, fmt::format("This model's maximum context length is {} tokens, but the prompt has at least {}; "
                       "shorten it or start the server with a larger --ctx",
                       n_ctx, n_prompt_tokens));
  e.type = "exceed_context_size_error";
  e.n_prompt_tokens = n_prompt_tokens;
  e.n_ctx = n_ctx;
  return e;
}

std::string to_json(const ApiError& error) {
  nlohmann::ordered_json e;
  e["message"] = error.message;
  e["type"] = error.type;
  e["param"] = error.param.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(error.param);
  e["code"] = error.http_code;
  if (error.n_prompt_tokens) e["n_prompt_tokens"] = *error.n_prompt_tokens;
  if (error.n_ctx) e["n_ctx"] = *error.n_ctx;
  nlohmann::ordered_json document;
  document["error"] = std::move(e);
  return document.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace narrows::server
