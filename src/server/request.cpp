// Bodies to requests. Fields that change nothing here are let pass, as OpenAI's clients send many; fields
// that ask for something that this server does not do are refused, so that nobody believes it was done.
#include "server/request.h"

#include <fmt/format.h>

#include <charconv>
#include <limits>
#include <random>

#include "sample/grammar.h"

namespace narrows::server {

namespace {

constexpr size_t kAnyLength = std::numeric_limits<size_t>::max();  ///< the body has its own limit
constexpr int64_t kMaxTokens = 1'000'000'000;
constexpr int64_t kMaxSeed = 0xFFFFFFFE;  ///< libllama takes the number above for "draw one"

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

/// Text of a message: a string, or an array of parts of type text.
std::string message_content(const Json& message, Fields& f) {
  const auto found = message.find("content");
  if (found == message.end() || found->is_null()) return {};
  if (found->is_string()) return found->get<std::string>();
  if (!found->is_array()) {
    f.fail("content", fmt::format("must be a string or an array of parts, not {}", kind_of(*found)));
    return {};
  }
  std::string text;
  for (const Json& part : *found) {
    const auto type = part.is_object() ? part.find("type") : part.end();
    const bool is_text = part.is_object() && type != part.end() && type->is_string() && *type == "text" &&
                         part.contains("text") && part["text"].is_string();
    if (!is_text) {
      f.fail("content", "holds a part that is not text; this server reads text only");
      return {};
    }
    text += part["text"].get<std::string>();
  }
  return text;
}

std::vector<ChatMessage> read_messages(Fields& f) {
  const Json* list = f.array("messages");
  if (list == nullptr) {
    f.fail("messages", "is missing");
    return {};
  }
  if (list->empty() || list->size() > kMaxMessages) {
    f.fail("messages", fmt::format("has {} items, it must have 1 to {}", list->size(), kMaxMessages));
    return {};
  }
  std::vector<ChatMessage> messages;
  for (size_t i = 0; i < list->size() && f.ok(); ++i) {
    const Json& item = (*list)[i];
    const std::string path = fmt::format("messages[{}]", i);
    if (!item.is_object()) {
      f.fail("messages", fmt::format("holds {}, it must hold objects only", kind_of(item)));
      break;
    }
    Fields m(item, path);
    std::string role = m.text("role", 64).value_or("");
    if (role == "developer") role = "system";  // the newer name of the same
    if (m.ok() && role != "system" && role != "user" && role != "assistant")
      m.fail("role", "must be system, user or assistant");
    std::string content = message_content(item, m);
    f.take(m);
    messages.push_back({std::move(role), std::move(content)});
  }
  return messages;
}

std::vector<Prompt> read_prompts(Fields& f, int64_t n_vocab) {
  const Json* value = f.find("prompt");
  if (value == nullptr) {
    f.fail("prompt", "is missing");
    return {};
  }
  if (value->is_string()) return {{value->get<std::string>(), {}, false}};
  if (!value->is_array() || value->empty()) {
    f.fail("prompt", "must be a string, an array of token ids, or an array of them");
    return {};
  }
  std::vector<Prompt> prompts;
  if (value->front().is_number()) {
    if (auto tokens = token_list(*value, n_vocab, f, "prompt"))
      prompts.push_back({{}, std::move(*tokens), true});
    return prompts;
  }
  if (value->size() > kMaxPrompts) f.fail("prompt", fmt::format("has more than {} items", kMaxPrompts));
  for (const Json& item : *value) {
    if (!f.ok()) break;
    if (item.is_string()) {
      prompts.push_back({item.get<std::string>(), {}, false});
    } else if (item.is_array()) {
      if (auto tokens = token_list(item, n_vocab, f, "prompt"))
        prompts.push_back({{}, std::move(*tokens), true});
    } else {
      f.fail("prompt", fmt::format("holds {}, it must hold strings or arrays of token ids", kind_of(item)));
    }
  }
  return prompts;
}

/// {"id": bias} as OpenAI has it, or [[id, bias]]; false as a bias forbids the token.
void read_logit_bias(Fields& f, int64_t n_vocab, std::vector<LogitBias>& out) {
  const Json* value = f.find("logit_bias");
  if (value == nullptr) return;
  const auto add = [&](int64_t id, const Json& bias) {
    const bool forbidden = bias.is_boolean() && !bias.get<bool>();
    if (id < 0 || id >= n_vocab) {
      f.fail("logit_bias", fmt::format("names token {}, the vocabulary has 0 to {}", id, n_vocab - 1));
    } else if (!forbidden &&
               (!bias.is_number() || !(bias.get<double>() >= -100 && bias.get<double>() <= 100))) {
      f.fail("logit_bias", "must have numbers from -100 to 100");
    } else {
      const float x = forbidden ? -std::numeric_limits<float>::infinity() : bias.get<float>();
      // -100 bans a token, says OpenAI; as a plain addition it need not.
      out.push_back({static_cast<Token>(id), x <= -100 ? -std::numeric_limits<float>::infinity() : x});
    }
  };
  if (value->is_object()) {
    for (const auto& [key, bias] : value->items()) {
      int64_t id = -1;
      const auto [end, code] = std::from_chars(key.data(), key.data() + key.size(), id);
      add(code == std::errc() && end == key.data() + key.size() ? id : -1, bias);
    }
  } else if (value->is_array()) {
    for (const Json& pair : *value) {
      const bool good = pair.is_array() && pair.size() == 2 && pair[0].is_number_integer();
      add(good ? pair[0].get<int64_t>() : -1, good ? pair[1] : Json());
    }
  } else {
    f.fail("logit_bias", fmt::format("must be an object, not {}", kind_of(*value)));
  }
}

void read_sampling(Fields& f, const RequestDefaults& defaults, SamplerOptions& s) {
  s = defaults.sampling;
  const auto real = [&](const char* name, double low, double high, float& out) {
    if (const auto x = f.number(name, low, high)) out = static_cast<float>(*x);
  };
  real("temperature", 0, 100, s.temperature);
  if (s.temperature > 0 && s.temperature < 0.001F) s.temperature = 0;  // no draw would tell them apart
  real("top_p", 0, 1, s.top_p);
  real("min_p", 0, 1, s.min_p);
  real("presence_penalty", -2, 2, s.presence_penalty);
  real("frequency_penalty", -2, 2, s.frequency_penalty);
  real("repeat_penalty", 0.01, 100, s.repeat_penalty);
  if (const auto k = f.integer("top_k", 0, std::numeric_limits<int32_t>::max()))
    s.top_k = static_cast<int32_t>(*k);
  if (const auto n = f.integer("repeat_last_n", 0, 1 << 20)) s.repeat_last_n = static_cast<int32_t>(*n);
  const auto seed = f.integer("seed", -1, std::numeric_limits<int64_t>::max());
  // Larger seeds fold onto 32 bits; -1 and none draw one.
  s.seed = static_cast<uint32_t>(seed && *seed >= 0 ? *seed % (kMaxSeed + 1)
                                                    : std::random_device()() % (kMaxSeed + 1));
  read_logit_bias(f, defaults.n_vocab, s.logit_bias);
}

/// What the answer must look like, from the four ways to say so.
void read_grammar(Fields& f, std::string& grammar) {
  std::optional<std::string> schema;
  int n_way = 0;
  if (const auto gbnf = f.text("grammar", kMaxGrammarBytes); gbnf && !gbnf->empty()) {
    grammar = *gbnf;
    ++n_way;
  }
  if (const Json* s = f.object("json_schema")) {
    schema = s->dump();
    ++n_way;
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
  const char* where = f.has("json_schema") ? "json_schema" : "response_format";
  if (schema->size() > kMaxGrammarBytes) {
    f.fail(where, fmt::format("has a schema of more than {} bytes", kMaxGrammarBytes));
    return;
  }
  const Result<std::string> converted = grammar_of_schema(*schema);
  if (!converted.ok()) {
    f.fail(where, fmt::format("has a schema that cannot be used: {}", converted.status().message()));
    return;
  }
  grammar = *converted;
}

void refuse_what_is_not_done(Fields& f) {
  for (const char* name : {"tools", "functions"}) {
    const Json* list = f.find(name);
    if (list != nullptr && !(list->is_array() && list->empty()))
      f.fail(name, "are not supported by this server");
  }
  for (const char* name : {"audio", "suffix"}) {
    if (f.has(name)) f.fail(name, "is not supported by this server");
  }
  (void)f.integer("best_of", 1, 1);
}

/// All but the prompt.
void read_common(Fields& f, const RequestDefaults& defaults, GenerationRequest& r) {
  r.model = f.text("model", 1024).value_or("");
  read_sampling(f, defaults, r.sampling);
  r.n = static_cast<int>(f.integer("n", 1, kMaxChoices).value_or(1));
  for (const char* name : {"max_tokens", "max_completion_tokens", "n_predict"}) {
    if (const auto n = f.integer(name, 0, kMaxTokens)) r.max_tokens = *n;
  }
  r.stops = f.texts("stop", kMaxStops, kMaxStopBytes).value_or(std::vector<std::string>());
  for (const std::string& stop : r.stops) {
    if (stop.empty()) f.fail("stop", "must hold no empty string, which every answer would end with");
  }
  r.ignore_eos = f.boolean("ignore_eos").value_or(false);
  r.cache_prompt = f.boolean("cache_prompt").value_or(true);
  r.stream = f.boolean("stream").value_or(false);
  r.return_progress = f.boolean("return_progress").value_or(false);
  if (const Json* options = f.object("stream_options")) {
    Fields inner(*options, "stream_options");
    r.include_usage = inner.boolean("include_usage").value_or(false);
    f.take(inner);
    if (!r.stream) f.fail("stream_options", "has no meaning without stream");
  }
  if (const Json* ours = f.object("narrows")) {
    Fields inner(*ours, "narrows");
    r.kv = inner.text("kv", 256).value_or("");
    f.take(inner);
  }
  read_grammar(f, r.grammar);
  refuse_what_is_not_done(f);
}

/// Parses, reads, and returns the result or the first error.
template <class Value, class Read>
std::optional<Value> read_body(std::string_view body, ApiError& error, Read&& read) {
  const std::optional<Json> json = parse_object(body, error);
  if (!json) return std::nullopt;
  Fields f(*json);
  Value value;
  read(f, value);
  if (f.ok()) return value;
  error = *f.error();
  return std::nullopt;
}

}  // namespace

std::optional<GenerationRequest> parse_chat(std::string_view body, const RequestDefaults& defaults,
                                            ApiError& error) {
  return read_body<GenerationRequest>(body, error, [&](Fields& f, GenerationRequest& r) {
    r.chat = true;
    r.messages = read_messages(f);
    read_common(f, defaults, r);
    const bool wanted = f.boolean("logprobs").value_or(false);
    const auto top = f.integer("top_logprobs", 0, kMaxTopLogprobs);
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
    if (r.echo && r.logprobs) f.fail("echo", "and logprobs cannot be given together");
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

std::optional<std::vector<ChatMessage>> parse_apply_template(std::string_view body, ApiError& error) {
  return read_body<std::vector<ChatMessage>>(
      body, error, [](Fields& f, std::vector<ChatMessage>& out) { out = read_messages(f); });
}

std::optional<std::string> parse_file_name(std::string_view body, ApiError& error) {
  return read_body<std::string>(body, error, [](Fields& f, std::string& out) {
    const auto name = f.text("filename", 255);
    if (f.ok() && !name) f.fail("filename", "is missing");
    out = name.value_or("");
  });
}

}  // namespace narrows::server
