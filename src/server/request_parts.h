// The parts that bodies of generations are read by, whatever their dialect.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "sample/grammar.h"
#include "server/request.h"

namespace narrows::server {

// request_chat.cpp
/// `messages` as OpenAI writes them.
std::vector<ChatMessage> read_messages(Fields& f);
/// A result's function is that of the call with its id: some templates want its name.
void name_results(std::vector<ChatMessage>& messages);
/// `tools`, `tool_choice`, `parallel_tool_calls`.
void read_tools(Fields& f, ChatRequest& chat);
/// Makes a tool of an item of `tools`; path: where its name and schema stand, for errors.
using ReadToolFn = std::function<void(Fields& item, ChatTool& tool, std::string& path)>;
/// `tools`, as every dialect bounds and adds them.
void read_tool_list(Fields& f, ChatRequest& chat, const ReadToolFn& read);
/// Of tools that are all there: names that the library's rules would mix up.
void check_tools(Fields& f, const ChatRequest& chat);
/// Thinking, the template's arguments, what becomes of a last message of the assistant.
void read_template_fields(Fields& f, GenerationRequest& r);

// request_sampling.cpp
void read_sampling(Fields& f, const RequestDefaults& defaults, GenerationRequest& r);

// request_refused.cpp
/// Fields that this server knows and does not do are refused; those that change nothing here are let pass.
void refuse_what_is_not_done(Fields& f);

std::optional<std::vector<Token>> token_list(const Json& list, int64_t n_vocab, Fields& f, const char* name);
/// Takes a JSON schema as the answer's grammar.
void use_schema(Fields& f, const char* where, const std::string& schema, GenerationRequest& r);
/// All of a generation but what it answers: lengths, sampling, streams, grammars. Every dialect of which
/// fields have OpenAI's names.
void read_common(Fields& f, const RequestDefaults& defaults, GenerationRequest& r);

/// Parses, reads, and returns the result or the first error; notes what is unknown.
template <class Value, class Read>
std::optional<Value> read_body(std::string_view body, ApiError& error, Read&& read) {
  const std::optional<Json> json = parse_object(body, error);
  if (!json) return std::nullopt;
  Fields f(*json);
  Value value;
  read(f, value);
  if constexpr (requires { value.warnings; }) {
    for (const std::string& name : f.unknown())
      value.warnings.push_back("the field " + name + " is not known here and was ignored");
  }
  if (f.ok()) return value;
  error = *f.error();
  return std::nullopt;
}

}  // namespace narrows::server
