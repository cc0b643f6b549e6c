// Bodies to requests. Fields that change nothing here are let pass, as OpenAI's clients send many; fields
// that ask for something that this server does not do are refused, so that nobody believes it was done.
#include "server/request.h"

#include <fmt/format.h>

#include <limits>

#include "sample/grammar.h"
#include "server/request_parts.h"

namespace narrows::server {

std::optional<std::vector<Token>> token_list(const Json& list, int64_t n_vocab, Fields& f, const char* name) {
  std::vector<Token> tokens;
  tokens.reserve(list.size());
  for (const Json& item : list) {
    const bool good = item.is_number_integer() && item.get<int64_t>() >= 0 && item.get<int64_t>() < n_vocab;
    if (!good) {
      f.fail(name, fmt::format("holds {}, which is not a token id from 0 to {}",
                               item.is_number() ? item.dump() : kind_of(item), n_vocab - 1));
      return std::nullopt;
    }
    tokens.push_back(static_cast<Token>(item.get<int64_t>()));
  }
  return tokens;
}

namespace {

constexpr int64_t kMaxTokens = 1'000'000'000;

std::vector<Prompt> read_prompts(Fields& f, int64_t n_vocab, const char* name = "prompt",
                                 size_t most = kMaxPrompts) {
  const Json* value = f.find(name);
  if (value == nullptr) {
    f.fail(name, "is missing");
    return {};
  }
  if (value->is_string()) return {{value->get<std::string>(), {}, false}};
  if (!value->is_array() || value->empty()) {
    f.fail(name, "must be a string, an array of token ids, or an array of them");
    return {};
  }
  std::vector<Prompt> prompts;
  if (value->front().is_number()) {
    if (auto tokens = token_list(*value, n_vocab, f, name)) prompts.push_back({{}, std::move(*tokens), true});
    return prompts;
  }
  if (value->size() > most) f.fail(name, fmt::format("has more than {} items", most));
  for (const Json& item : *value) {
    if (!f.ok()) break;
    if (item.is_string()) {
      prompts.push_back({item.get<std::string>(), {}, false});
    } else if (item.is_array()) {
      if (auto tokens = token_list(item, n_vocab, f, name)) prompts.push_back({{}, std::move(*tokens), true});
    } else {
      f.fail(name, fmt::format("holds {}, it must hold strings or arrays of token ids", kind_of(item)));
    }
  }
  return prompts;
}

/// What the answer must look like, from the four ways to say so.
void read_grammar(Fields& f, GenerationRequest& r) {
  std::optional<std::string> schema;
  int n_way = 0;
  if (const auto gbnf = f.text("grammar", kMaxGrammarBytes); gbnf && !gbnf->empty()) {
    r.grammar = *gbnf;
    ++n_way;
  }
  for (const char* name : {"json_schema", "guided_json"}) {
    if (const Json* s = f.object(name)) {
      schema = s->dump();
      ++n_way;
    }
  }
  if (const Json* format = f.object("response_format")) {
    Fields inner(*format, "response_format");
    const std::string type = inner.text("type", 64).value_or("");
    if (type == "json_object") {
      const Json* s = inner.object("schema");
      schema = s != nullptr ? s->dump() : R"({"type":"object"})";
      ++n_way;
    } else if (type == "json_schema") {
      const Json* outer = inner.object("json_schema");
      const auto found = outer != nullptr ? outer->find("schema") : Json::const_iterator();
      if (outer == nullptr || found == outer->end() || !found->is_object()) {
        inner.fail("json_schema", "must be an object with a schema in it");
      } else {
        schema = found->dump();
        ++n_way;
      }
    } else if (type != "text") {
      inner.fail("type", "must be text, json_object or json_schema");
    }
    f.take(inner);
  }
  if (n_way > 1) f.fail("response_format", "and grammar or json_schema cannot be given together");
  if (!f.ok() || !schema) return;
  use_schema(f,
             f.has("json_schema")   ? "json_schema"
             : f.has("guided_json") ? "guided_json"
                                    : "response_format",
             *schema, r);
}

}  // namespace

void use_schema(Fields& f, const char* where, const std::string& schema, GenerationRequest& r) {
  if (schema.size() > kMaxGrammarBytes) {
    f.fail(where, fmt::format("has a schema of more than {} bytes", kMaxGrammarBytes));
    return;
  }
  const Result<std::string> converted = grammar_of_schema(schema);
  if (!converted.ok()) {
    f.fail(where, fmt::format("has a schema that cannot be used: {}", converted.status().message()));
    return;
  }
  r.grammar = *converted;
}

void read_common(Fields& f, const RequestDefaults& defaults, GenerationRequest& r) {
  r.model = f.text("model", 1024).value_or("");
  read_sampling(f, defaults, r);
  for (const char* name : {"n_cmpl", "n"}) {
    if (const auto n = f.integer(name, 1, kMaxChoices)) r.n = static_cast<int>(*n);
  }
  r.max_tokens = defaults.max_tokens;
  for (const char* name : {"max_tokens", "max_completion_tokens", "n_predict"}) {
    // -1: until the model ends or the context is full
    if (const auto n = f.integer(name, -1, kMaxTokens)) r.max_tokens = *n < 0 ? std::nullopt : n;
  }
  r.stops = f.texts("stop", kMaxStops, kMaxStopBytes).value_or(std::vector<std::string>());
  for (const std::string& stop : r.stops) {
    if (stop.empty()) f.fail("stop", "must hold no empty string, which every answer would end with");
  }
  if (const Json* ids = f.array("stop_token_ids")) {
    if (ids->size() > kMaxStopTokens)
      f.fail("stop_token_ids", fmt::format("has more than {} items", kMaxStopTokens));
    else if (auto tokens = token_list(*ids, defaults.n_vocab, f, "stop_token_ids"))
      r.stop_tokens = std::move(*tokens);
  }
  r.show_special = !f.boolean("skip_special_tokens").value_or(true);
  r.ignore_eos = f.boolean("ignore_eos").value_or(false);
  r.cache_prompt = f.boolean("cache_prompt").value_or(true);
  if (const auto slot = f.integer("id_slot", -1, defaults.n_slots - 1)) r.id_slot = static_cast<int>(*slot);
  r.stream = f.boolean("stream").value_or(false);
  r.return_progress = f.boolean("return_progress").value_or(false);
  if (const Json* options = f.object("stream_options")) {
    Fields inner(*options, "stream_options");
    r.include_usage = inner.boolean("include_usage").value_or(false);
    inner.pass("include_obfuscation");
    f.take(inner);
    if (!r.stream) f.fail("stream_options", "has no meaning without stream");
  }
  if (const Json* ours = f.object("narrows")) {
    Fields inner(*ours, "narrows");
    r.kv = inner.text("kv", 256).value_or("");
    f.take(inner);
  }
  read_grammar(f, r);
  refuse_what_is_not_done(f);
  if (r.sampling.min_tokens > 0 && !r.grammar.empty())
    f.fail("min_tokens", "and a grammar or schema cannot be given together");
}

std::optional<GenerationRequest> parse_chat(std::string_view body, const RequestDefaults& defaults,
                                            ApiError& error) {
  return read_body<GenerationRequest>(body, error, [&](Fields& f, GenerationRequest& r) {
    r.chat = true;
    r.conversation.messages = read_messages(f);
    read_common(f, defaults, r);
    read_tools(f, r.conversation);
    read_template_fields(f, r);
    if (!r.conversation.tools.empty() && r.conversation.tool_choice != ToolChoice::none && !r.grammar.empty())
      f.fail("tools", "and response_format, a schema or a grammar cannot be given together");
    // All of an answer that follows a grammar is its content.
    if (!r.grammar.empty()) r.conversation.split_reasoning = false;
    const bool wanted = f.boolean("logprobs").value_or(false);
    const auto top = f.integer("top_logprobs", 0, kMaxTopLogprobs);
    if (const auto n = f.integer("n_probs", 0, kMaxTopLogprobs); n && *n > 0)
      r.logprobs = static_cast<int>(*n);
    if (wanted) r.logprobs = static_cast<int>(top.value_or(0));
    if (top && *top > 0 && !wanted) f.fail("top_logprobs", "has no meaning without logprobs");
  });
}

std::optional<GenerationRequest> parse_completion(std::string_view body, const RequestDefaults& defaults,
                                                  ApiError& error) {
  return read_body<GenerationRequest>(body, error, [&](Fields& f, GenerationRequest& r) {
    r.prompts = read_prompts(f, defaults.n_vocab);
    read_common(f, defaults, r);
    if (const auto n = f.integer("logprobs", 0, kMaxTopLogprobs)) r.logprobs = static_cast<int>(*n);
    r.echo = f.boolean("echo").value_or(false);
    if (const auto n = f.integer("n_probs", 0, kMaxTopLogprobs); n && *n > 0)
      r.logprobs = static_cast<int>(*n);
    // What is cached has no logits.
    if (r.echo && r.logprobs) r.cache_prompt = false;
  });
}

std::optional<EmbeddingRequest> parse_embedding(std::string_view body, int64_t n_vocab, int64_t n_embd,
                                                ApiError& error) {
  return read_body<EmbeddingRequest>(body, error, [&](Fields& f, EmbeddingRequest& r) {
    // llama.cpp's /embedding calls it content.
    r.inputs =
        read_prompts(f, n_vocab, f.has("content") && !f.has("input") ? "content" : "input", kMaxInputs);
    const std::string format = f.text("encoding_format", 64).value_or("float");
    r.base64 = format == "base64";
    if (!r.base64 && format != "float") f.fail("encoding_format", "must be float or base64");
    if (const auto n = f.integer("dimensions", 1, std::numeric_limits<int32_t>::max()); n && *n != n_embd)
      f.fail("dimensions", fmt::format("must be {}, which is what this model gives", n_embd));
    if (const auto norm = f.integer("embd_normalize", -1, 2); norm && *norm != 2)
      f.fail("embd_normalize", "is not supported by this server but for 2");
    for (const char* name : {"model", "user"}) f.pass(name);
  });
}

std::optional<TokenizeRequest> parse_tokenize(std::string_view body, ApiError& error) {
  return read_body<TokenizeRequest>(body, error, [](Fields& f, TokenizeRequest& r) {
    const auto content = f.text("content", kMaxTokenizeBytes);
    if (f.ok() && !content) f.fail("content", "is missing");
    r.content = content.value_or("");
    r.add_special = f.boolean("add_special").value_or(false);
    r.parse_special = f.boolean("parse_special").value_or(true);
    r.with_pieces = f.boolean("with_pieces").value_or(false);
  });
}

std::optional<std::vector<Token>> parse_detokenize(std::string_view body, int64_t n_vocab, ApiError& error) {
  return read_body<std::vector<Token>>(body, error, [&](Fields& f, std::vector<Token>& out) {
    const Json* list = f.array("tokens");
    if (list == nullptr) {
      f.fail("tokens", "is missing");
    } else if (auto tokens = token_list(*list, n_vocab, f, "tokens")) {
      out = std::move(*tokens);
    }
  });
}

std::optional<GenerationRequest> parse_apply_template(std::string_view body, ApiError& error) {
  return read_body<GenerationRequest>(body, error, [](Fields& f, GenerationRequest& r) {
    r.conversation.messages = read_messages(f);
    read_tools(f, r.conversation);
    read_template_fields(f, r);
  });
}

std::optional<std::string> parse_file_name(std::string_view body, ApiError& error) {
  return read_body<std::string>(body, error, [](Fields& f, std::string& out) {
    const auto name = f.text("filename", 255);
    if (f.ok() && !name) f.fail("filename", "is missing");
    out = name.value_or("");
  });
}

}  // namespace narrows::server
