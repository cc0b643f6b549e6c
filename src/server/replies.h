// What replies of all dialects have in common.
#pragma once

#include <string>

#include "server/job.h"
#include "server/json_fields.h"

namespace narrows::server {

/// One line, always UTF-8: bytes that are no characters become U+FFFD.
std::string dump(const Json& json);

/// A server-sent event; `name`: null if it has none.
std::string sse(const Json& data, const char* name = nullptr);

/// {"error": {...}} as OpenAI has it.
Json openai_error(const ApiError& error);

/// What only this server has to say of a choice.
Json extras_of(const Job& job, const ChoiceResult& result);
/// The same as llama.cpp's server says it.
Json timings_of(const ChoiceResult& result);

}  // namespace narrows::server
