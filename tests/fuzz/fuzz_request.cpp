// Bodies of requests: refused with a sentence, or taken with every number in its range. The first byte says
// which endpoint reads the rest.
#include <cmath>

#include "base/utf8.h"
#include "fuzz/fuzz.h"
#include "server/http_server.h"
#include "server/request.h"
#include "text/llama_log.h"

namespace narrows::fuzz {

namespace {

constexpr int64_t kVocab = 1000;
enum Endpoint : char { chat, completion, tokenize, detokenize, apply_template, file_name, n_endpoint };

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
  check(r.chat ? !r.messages.empty() : !r.prompts.empty(), "no prompt");
  for (const server::Prompt& p : r.prompts) {
    for (const Token t : p.tokens) check_range(0, t, kVocab - 1, "a token");
  }
}

}  // namespace

std::vector<Seed> seeds() {
  const std::string messages =
      R"("messages":[{"role":"system","content":"Be kind."},{"role":"user","content":)"
      R"([{"type":"text","text":"Hi \u00fc"}]}])";
  return {
      seed(chat, "{" + messages + "}"),
      seed(chat,
           "{" + messages + R"(,"temperature":0.5,"top_p":0.9,"top_k":40,"min_p":0.1,"seed":7,"n":2,)" +
               R"("max_tokens":5,"stop":["a","b"],"stream":true,"stream_options":{"include_usage":true},)" +
               R"("logprobs":true,"top_logprobs":3,"logit_bias":{"5":-100,"6":1.5},"presence_penalty":1,)" +
               R"("frequency_penalty":-2,"narrows":{"kv":"f16"},"return_progress":true})"),
      seed(chat,
           "{" + messages +
               R"(,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":)" +
               R"("object","properties":{"a":{"type":"array","items":{"enum":["b",1,null]},"maxItems":3},)" +
               R"("c":{"$ref":"#/$defs/d"}},"required":["a"],"$defs":{"d":{"type":"string",)" +
               R"("pattern":"^[a-c]{2,5}x?$"}}}}}})"),
      seed(chat, "{" + messages + R"(,"response_format":{"type":"json_object"}})"),
      seed(chat, "{" + messages + R"(,"grammar":"root ::= \"a\" | [b-z]{1,3} root?"})"),
      seed(completion, R"({"prompt":"Once","echo":true,"logprobs":2})"),
      seed(completion, R"({"prompt":["a",[1,2,3]],"max_tokens":1,"logit_bias":[[4,false]],"stop":"x"})"),
      seed(completion, R"({"prompt":[1,2,999],"cache_prompt":false,"ignore_eos":true})"),
      seed(tokenize, R"({"content":"text","add_special":true,"with_pieces":true})"),
      seed(detokenize, R"({"tokens":[1,2,3]})"),
      seed(apply_template, "{" + messages + "}"),
      seed(file_name, R"({"filename":"../a"})"),
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
  switch (data[0] % fuzz::n_endpoint) {
    case fuzz::chat:
    case fuzz::completion: {
      const auto r = data[0] % fuzz::n_endpoint == fuzz::chat
                         ? server::parse_chat(body, defaults, error)
                         : server::parse_completion(body, defaults, error);
      taken = r.has_value();
      if (taken) fuzz::check_generation(*r);
      break;
    }
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
