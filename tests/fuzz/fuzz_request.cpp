// Bodies of requests: refused with a sentence, or taken with every number in its range. The first byte says
// which endpoint reads the rest.
#include <cmath>

#include "base/utf8.h"
#include "fuzz/fuzz.h"
#include "server/dialect.h"
#include "server/http_server.h"
#include "server/replies.h"
#include "server/request.h"
#include "text/llama_log.h"

namespace narrows::fuzz {

namespace {

constexpr int64_t kVocab = 1000;
enum Endpoint : char {
  chat,
  completion,
  tokenize,
  detokenize,
  apply_template,
  file_name,
  messages,
  responses,
  ollama_chat,
  ollama_generate,
  infill,
  n_endpoint
};

/// Of the endpoints that are generations.
const server::Dialect* dialect_of(int endpoint) {
  switch (endpoint) {
    case chat:
      return &server::kOpenAiChat;
    case completion:
      return &server::kOpenAiCompletion;
    case messages:
      return &server::kAnthropic;
    case responses:
      return &server::kResponses;
    case ollama_chat:
      return &server::kOllamaChat;
    case ollama_generate:
      return &server::kOllamaGenerate;
    case infill:
      return &server::kInfill;
    default:
      return nullptr;
  }
}

Seed seed(Endpoint endpoint, const std::string& body) {
  return {static_cast<char>(endpoint) + body, body.size() + 1};
}

void check_error(const server::ApiError& error) {
  check(error.http_code >= 400 && error.http_code < 500, "a bad request is no client's error");
  check_sentence({StatusCode::invalid_argument, error.message});
  const std::string json = server::to_json(error);
  check(find_invalid_utf8(json) == std::string::npos, "an error that is not UTF-8");
}

void check_range(double low, double x, double high, const char* what) {
  check(x >= low && x <= high, std::string(what) + " is out of range");
}

void check_generation(const server::GenerationRequest& r) {
  const SamplerOptions& s = r.sampling;
  check_range(0, s.temperature, 100, "temperature");
  check_range(0, s.top_p, 1, "top_p");
  check_range(0, s.min_p, 1, "min_p");
  check_range(-2, s.presence_penalty, 2, "presence_penalty");
  check_range(-2, s.frequency_penalty, 2, "frequency_penalty");
  check_range(0.001, s.repeat_penalty, 100, "repeat_penalty");
  check_range(0, s.top_k, 1e10, "top_k");
  check_range(1, r.n, server::kMaxChoices, "n");
  check_range(0, static_cast<double>(r.max_tokens.value_or(0)), 1e9, "max_tokens");
  check_range(0, r.logprobs.value_or(0), server::kMaxTopLogprobs, "logprobs");
  check(r.stops.size() <= server::kMaxStops, "stop strings");
  for (const LogitBias& b : s.logit_bias) {
    check_range(0, b.token, kVocab - 1, "a biased token");
    check(!std::isnan(b.bias) && b.bias <= 100, "a bias is out of range");
  }
  check(r.chat ? !r.conversation.messages.empty() : !r.prompts.empty() || r.infill, "no prompt");
  for (const ChatTool& tool : r.conversation.tools) {
    check(!tool.name.empty() && tool.name.find_first_of("\"\\<> \n") == std::string::npos, "a tool's name");
    check(server::Json::accept(tool.plain_parameters) && server::Json::accept(tool.parameters),
          "a tool's parameters are no JSON");
  }
  for (const ChatMessage& m : r.conversation.messages) {
    for (const ToolCall& call : m.tool_calls) check(!call.name.empty(), "a call of nothing");
  }
  check_range(0, s.min_tokens, 1e10, "min_tokens");
  check_range(0, s.mirostat, 2, "mirostat");
  check_range(0, s.typical_p, 1, "typical_p");
  for (const server::Prompt& p : r.prompts) {
    for (const Token t : p.tokens) check_range(0, t, kVocab - 1, "a token");
  }
}

}  // namespace

std::vector<Seed> seeds() {
  const std::string talk = R"("messages":[{"role":"system","content":"Be kind."},{"role":"user","content":)"
                           R"([{"type":"text","text":"Hi \u00fc"}]}])";
  return {
      seed(chat, "{" + talk + "}"),
      seed(chat,
           "{" + talk + R"(,"temperature":0.5,"top_p":0.9,"top_k":40,"min_p":0.1,"seed":7,"n":2,)" +
               R"("max_tokens":5,"stop":["a","b"],"stream":true,"stream_options":{"include_usage":true},)" +
               R"("logprobs":true,"top_logprobs":3,"logit_bias":{"5":-100,"6":1.5},"presence_penalty":1,)" +
               R"("frequency_penalty":-2,"narrows":{"kv":"f16"},"return_progress":true})"),
      seed(chat,
           "{" + talk +
               R"(,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":)" +
               R"("object","properties":{"a":{"type":"array","items":{"enum":["b",1,null]},"maxItems":3},)" +
               R"("c":{"$ref":"#/$defs/d"}},"required":["a"],"$defs":{"d":{"type":"string",)" +
               R"("pattern":"^[a-c]{2,5}x?$"}}}}}})"),
      seed(chat, "{" + talk + R"(,"response_format":{"type":"json_object"}})"),
      seed(chat, "{" + talk + R"(,"grammar":"root ::= \"a\" | [b-z]{1,3} root?"})"),
      seed(completion, R"({"prompt":"Once","echo":true,"logprobs":2})"),
      seed(completion, R"({"prompt":["a",[1,2,3]],"max_tokens":1,"logit_bias":[[4,false]],"stop":"x"})"),
      seed(completion, R"({"prompt":[1,2,999],"cache_prompt":false,"ignore_eos":true})"),
      seed(tokenize, R"({"content":"text","add_special":true,"with_pieces":true})"),
      seed(detokenize, R"({"tokens":[1,2,3]})"),
      seed(apply_template, "{" + talk + "}"),
      seed(file_name, R"({"filename":"../a"})"),
      seed(
          chat,
          "{" + talk +
              R"(,"tools":[{"type":"function","function":{"name":"f","description":"d","parameters":{"type":)" +
              R"("object","properties":{"a":{"$ref":"#/$defs/b"}},"$defs":{"b":{"type":"string","pattern":)" +
              R"("^a+$"}}}}}],"tool_choice":{"type":"function","function":{"name":"f"}},)" +
              R"("parallel_tool_calls":true,"chat_template_kwargs":{"enable_thinking":false},)" +
              R"("reasoning_effort":"low","samplers":["dry","top_k"],"min_tokens":2,"stop_token_ids":[3]})"),
      seed(chat,
           R"({"messages":[{"role":"user","content":"x"},{"role":"assistant","tool_calls":[{"id":"1","type":)"
           R"("function","function":{"name":"f","arguments":"{\"a\":[1]}"}}]},{"role":"tool","tool_call_id":)"
           R"("1","content":"y"}],"continue_final_message":false})"),
      seed(
          messages,
          R"({"max_tokens":5,"system":"s","messages":[{"role":"user","content":[{"type":"tool_result",)"
          R"("tool_use_id":"t","content":"x","is_error":true}]},{"role":"assistant","content":[{"type":"tool_use",)"
          R"("id":"t","name":"f","input":{"a":1}}]}],"tools":[{"name":"f","input_schema":{"type":"object"}}],)"
          R"("tool_choice":{"type":"tool","name":"f"},"thinking":{"type":"enabled","budget_tokens":1024}})"),
      seed(
          responses,
          R"({"instructions":"i","input":[{"role":"user","content":[{"type":"input_text","text":"x"}]},)"
          R"({"type":"function_call","call_id":"c","name":"f","arguments":"{}"},{"type":"function_call_output",)"
          R"("call_id":"c","output":"y"},{"type":"reasoning","summary":[]}],"text":{"format":{"type":"text"}},)"
          R"("tools":[{"type":"function","name":"f","parameters":{}}],"reasoning":{"effort":"low"}})"),
      seed(
          ollama_chat,
          R"({"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"","tool_calls":[{"function":)"
          R"({"name":"f","arguments":{"a":1}}}]}],"options":{"num_predict":-1,"top_k":3},"format":{"type":"object"},)"
          R"("think":true})"),
      seed(ollama_generate,
           R"({"prompt":"p","system":"s","raw":false,"options":{"stop":["x"]},"format":"json"})"),
      seed(infill, R"({"input_prefix":"a","input_suffix":"b","prompt":"c","n_probs":2})"),
  };
}

}  // namespace narrows::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace narrows;
  if (size == 0) return 0;
  silence_llama_log();
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  server::RequestDefaults defaults;
  defaults.n_vocab = fuzz::kVocab;
  server::ApiError error;
  bool taken = false;
  if (const server::Dialect* dialect = fuzz::dialect_of(data[0] % fuzz::n_endpoint)) {
    const auto r = dialect->parse(body, defaults, error);
    if (r) fuzz::check_generation(*r);
    taken = r.has_value();
    if (!taken) (void)server::dump(dialect->error(error));
  } else
    switch (data[0] % fuzz::n_endpoint) {
      case fuzz::tokenize:
        taken = server::parse_tokenize(body, error).has_value();
        break;
      case fuzz::detokenize: {
        const auto tokens = server::parse_detokenize(body, fuzz::kVocab, error);
        taken = tokens.has_value();
        if (taken) {
          for (const Token t : *tokens) fuzz::check_range(0, t, fuzz::kVocab - 1, "a token");
        }
        break;
      }
      case fuzz::apply_template:
        taken = server::parse_apply_template(body, error).has_value();
        break;
      default: {
        const auto name = server::parse_file_name(body, error);
        taken = name.has_value();
        if (taken && server::check_session_name(*name).ok())
          fuzz::check(name->find_first_of("/\\\n") == std::string::npos && name->front() != '.',
                      "a name that leaves its folder");
      }
    }
  if (taken) {
    ++fuzz::g_accepted;
  } else {
    fuzz::check_error(error);
  }
  return 0;
}
