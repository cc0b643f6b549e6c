// Bodies of requests: what they mean, and what is refused with the name of the field.
#include "server/request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "server/job.h"
#include "server/json_fields.h"

namespace narrows::server {
namespace {

using ::testing::HasSubstr;

const RequestDefaults kDefaults = [] {
  RequestDefaults d;
  d.n_vocab = 1000;
  return d;
}();

GenerationRequest chat(const std::string& fields) {
  ApiError error;
  const auto r =
      parse_chat(R"({"messages":[{"role":"user","content":"hi"}])" + fields + "}", kDefaults, error);
  EXPECT_TRUE(r.has_value()) << error.message << " of " << fields;
  return r.value_or(GenerationRequest());
}

GenerationRequest completion(const std::string& body) {
  ApiError error;
  const auto r = parse_completion(body, kDefaults, error);
  EXPECT_TRUE(r.has_value()) << error.message << " of " << body;
  return r.value_or(GenerationRequest());
}

void expect_refused(const std::optional<GenerationRequest>& r, const ApiError& error,
                    const std::string& param, const std::string& body) {
  EXPECT_FALSE(r.has_value()) << body;
  EXPECT_EQ(error.http_code, 400) << body;
  EXPECT_EQ(error.type, "invalid_request_error") << body;
  EXPECT_EQ(error.param, param) << body;
  EXPECT_FALSE(error.message.empty());
  EXPECT_NE(error.message.back(), '.') << error.message;
  if (!param.empty()) {
    EXPECT_THAT(error.message, HasSubstr(param));
  }
}

void expect_chat_refused(const std::string& fields, const std::string& param) {
  ApiError error;
  const std::string body = R"({"messages":[{"role":"user","content":"hi"}],)" + fields + "}";
  expect_refused(parse_chat(body, kDefaults, error), error, param, body);
}

void expect_body_refused(const std::string& body, const std::string& param) {
  ApiError error;
  expect_refused(parse_chat(body, kDefaults, error), error, param, body);
}

// docs/server_api.md: "Defaults of sampling"
TEST(ChatRequest, Defaults) {
  const GenerationRequest r = chat("");
  EXPECT_TRUE(r.chat);
  ASSERT_EQ(r.conversation.messages.size(), 1U);
  EXPECT_EQ(r.conversation.messages[0].content, "hi");
  EXPECT_EQ(r.n, 1);
  EXPECT_FALSE(r.max_tokens || r.logprobs || r.stream || r.include_usage || r.return_progress ||
               r.ignore_eos);
  EXPECT_TRUE(r.cache_prompt);
  EXPECT_FLOAT_EQ(r.sampling.temperature, 0.7F);
  EXPECT_EQ(r.sampling.top_k, 40);
  EXPECT_FLOAT_EQ(r.sampling.top_p, 0.95F);
  EXPECT_FLOAT_EQ(r.sampling.min_p, 0.05F);
  EXPECT_NE(chat("").sampling.seed, chat("").sampling.seed);  // drawn anew
}

// docs/server_api.md: "-100 or false forbids a token"
TEST(ChatRequest, AllFields) {
  const GenerationRequest r = chat(
      R"(,"model":"m","max_tokens":7,"temperature":0.5,"top_p":0.9,"top_k":5,"min_p":0.1,"presence_penalty":1,
         "frequency_penalty":-1,"repeat_penalty":1.1,"repeat_last_n":9,"seed":11,"n":3,"stop":["a","b"],"stream":true,
         "stream_options":{"include_usage":true},"return_progress":true,"logprobs":true,"top_logprobs":2,"cache_prompt":false,
         "ignore_eos":true,"logit_bias":{"5":1.5,"6":-100,"7":false},"narrows":{"kv":"klt-10x"},"user":"x","tools":[])");
  EXPECT_EQ(r.model, "m");
  EXPECT_EQ(r.max_tokens, 7);
  EXPECT_FLOAT_EQ(r.sampling.temperature, 0.5F);
  EXPECT_FLOAT_EQ(r.sampling.top_p, 0.9F);
  EXPECT_EQ(r.sampling.top_k, 5);
  EXPECT_FLOAT_EQ(r.sampling.min_p, 0.1F);
  EXPECT_FLOAT_EQ(r.sampling.presence_penalty, 1);
  EXPECT_FLOAT_EQ(r.sampling.frequency_penalty, -1);
  EXPECT_FLOAT_EQ(r.sampling.repeat_penalty, 1.1F);
  EXPECT_EQ(r.sampling.repeat_last_n, 9);
  EXPECT_EQ(r.sampling.seed, 11U);
  EXPECT_EQ(r.n, 3);
  EXPECT_EQ(r.stops, (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(r.stream && r.include_usage && r.return_progress && r.ignore_eos);
  EXPECT_FALSE(r.cache_prompt);
  EXPECT_EQ(r.logprobs, 2);
  EXPECT_EQ(r.kv, "klt-10x");
  ASSERT_EQ(r.sampling.logit_bias.size(), 3U);
  EXPECT_FLOAT_EQ(r.sampling.logit_bias[0].bias, 1.5F);
  EXPECT_TRUE(std::isinf(r.sampling.logit_bias[1].bias) && std::isinf(r.sampling.logit_bias[2].bias));
}

// docs/server_api.md: "a string or up to 16"
TEST(ChatRequest, OtherSpellings) {
  EXPECT_EQ(chat(R"(,"stop":"x")").stops, std::vector<std::string>{"x"});
  EXPECT_EQ(chat(R"(,"max_completion_tokens":5)").max_tokens, 5);
  EXPECT_EQ(chat(R"(,"seed":-1,"max_tokens":null,"stop":null)").max_tokens, std::nullopt);
  EXPECT_EQ(chat(R"(,"seed":4294967295)").sampling.seed,
            0U);  // folded: libllama takes the largest for "draw one"
  EXPECT_EQ(chat(R"(,"seed":9223372036854775807)").sampling.seed, 9223372036854775807ULL % 4294967295ULL);
  EXPECT_EQ(chat(R"(,"temperature":0.0001)").sampling.temperature, 0);
  EXPECT_EQ(chat(R"(,"max_tokens":3.0)").max_tokens, 3);
  EXPECT_EQ(chat(R"(,"logit_bias":[[5,1]])").sampling.logit_bias.size(), 1U);
  EXPECT_EQ(chat(R"(,"response_format":{"type":"text"})").grammar, "");
  ApiError error;
  const auto parts = parse_chat(
      R"({"messages":[{"role":"developer","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
         {"role":"assistant","content":null}]})",
      kDefaults, error);
  ASSERT_TRUE(parts.has_value()) << error.message;
  EXPECT_EQ(parts->conversation.messages[0].role, "system");
  EXPECT_EQ(parts->conversation.messages[0].content, "ab");
  EXPECT_EQ(parts->conversation.messages[1].content, "");
}

TEST(ChatRequest, Grammars) {
  EXPECT_EQ(chat(R"(,"grammar":"root ::= \"a\"")").grammar, "root ::= \"a\"");
  EXPECT_THAT(chat(R"(,"response_format":{"type":"json_object"})").grammar, HasSubstr("root"));
  const std::string schema =
      R"({"type":"object","properties":{"zebra":{"type":"integer"}},"required":["zebra"]})";
  for (const std::string& way :
       {R"(,"json_schema":)" + schema, R"(,"response_format":{"type":"json_object","schema":)" + schema + "}",
        R"(,"response_format":{"type":"json_schema","json_schema":{"name":"x","strict":true,"schema":)" +
            schema + "}}"})
    EXPECT_THAT(chat(way).grammar, HasSubstr("zebra")) << way;
  expect_chat_refused(R"("response_format":{"type":"xml"})", "response_format.type");
  expect_chat_refused(R"("response_format":{"type":"json_schema"})", "response_format.json_schema");
  expect_chat_refused(R"("response_format":"json")", "response_format");
  expect_chat_refused(R"("json_schema":{"type":"nonsense"})", "json_schema");
  // llama.cpp's converter would follow it without end.
  const std::string circle = R"({"$defs":{"a":{"$ref":"#/$defs/a"}},"allOf":[{"$ref":"#/$defs/a"}]})";
  expect_chat_refused(R"("json_schema":)" + circle, "json_schema");
  expect_chat_refused(R"("response_format":{"type":"json_object","schema":)" + circle + "}",
                      "response_format");
  expect_chat_refused(R"("response_format":{"type":"json_schema","json_schema":{"schema":)" + circle + "}}",
                      "response_format");
  expect_chat_refused(R"("grammar":"root ::= \"a\"","json_schema":{})", "response_format");
  std::string deep = R"({"type":"object"})";
  for (int i = 0; i < 20; ++i) deep = R"({"type":"object","properties":{"a":)" + deep + "}}";
  EXPECT_FALSE(chat(R"(,"json_schema":)" + deep).grammar.empty());
  for (int i = 0; i < 30; ++i) deep = R"({"type":"object","properties":{"a":)" + deep + "}}";
  expect_chat_refused(R"("json_schema":)" + deep, "");  // nested too deep as a whole
}

// docs/server_api.md: "Numbers that are out of range or no numbers"
TEST(ChatRequest, RefusesFieldsThatAreWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {R"("temperature":-1)", "temperature"},
      {R"("temperature":"hot")", "temperature"},
      {R"("temperature":1e300)", "temperature"},
      {R"("top_p":1.5)", "top_p"},
      {R"("top_p":-0.1)", "top_p"},
      {R"("top_k":-3)", "top_k"},
      {R"("top_k":2.5)", "top_k"},
      {R"("min_p":2)", "min_p"},
      {R"("presence_penalty":3)", "presence_penalty"},
      {R"("frequency_penalty":-2.1)", "frequency_penalty"},
      {R"("repeat_penalty":0)", "repeat_penalty"},
      {R"("max_tokens":-2)", "max_tokens"},
      {R"("max_tokens":"5")", "max_tokens"},
      {R"("max_tokens":99999999999999999999)", "max_tokens"},
      {R"("n":0)", "n"},
      {R"("n":17)", "n"},
      {R"("seed":-2)", "seed"},
      {R"("seed":1.5)", "seed"},
      {R"("stop":5)", "stop"},
      {R"("stop":"")", "stop"},
      {R"("stop":["a",""])", "stop"},
      {R"("stop":["a",5])", "stop"},
      {R"("stop":["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"])", "stop"},
      {R"("stream":"yes")", "stream"},
      {R"("stream_options":{"include_usage":true})", "stream_options"},
      {R"("stream":true,"stream_options":{"include_usage":1})", "stream_options.include_usage"},
      {R"("logprobs":1)", "logprobs"},
      {R"("logprobs":true,"top_logprobs":21)", "top_logprobs"},
      {R"("top_logprobs":3)", "top_logprobs"},
      {R"("logit_bias":{"1000":1})", "logit_bias"},
      {R"("logit_bias":{"-1":1})", "logit_bias"},
      {R"("logit_bias":{"x":1})", "logit_bias"},
      {R"("logit_bias":{"5":101})", "logit_bias"},
      {R"("logit_bias":{"5":"1"})", "logit_bias"},
      {R"("logit_bias":7)", "logit_bias"},
      {R"("logit_bias":[[1]])", "logit_bias"},
      {R"("tools":[{"type":"function"}])", "tools[0].function"},
      {R"("functions":[{}])", "functions"},
      {R"("audio":{})", "audio"},
      {R"("best_of":2)", "best_of"},
      {R"("narrows":5)", "narrows"},
      {R"("narrows":{"kv":5})", "narrows.kv"},
      {R"("grammar":5)", "grammar"},
  };
  for (const auto& [fields, param] : cases) expect_chat_refused(fields, param);
}

TEST(ChatRequest, RefusesMessagesThatAreNone) {
  expect_body_refused("{}", "messages");
  expect_body_refused(R"({"messages":[]})", "messages");
  expect_body_refused(R"({"messages":"hi"})", "messages");
  expect_body_refused(R"({"messages":["hi"]})", "messages");
  expect_body_refused(R"({"messages":[{"role":"king","content":"x"}]})", "messages[0].role");
  expect_body_refused(R"({"messages":[{"content":"x"}]})", "messages[0].role");
  expect_body_refused(R"({"messages":[{"role":"user","content":5}]})", "messages[0].content");
  expect_body_refused(R"({"messages":[{"role":"user","content":[{"type":"image_url"}]}]})",
                      "messages[0].content");
}

// docs/server_api.md: "Sizes of bodies, headers, schemas"
TEST(Body, MustBeAJsonObject) {
  const std::string not_utf8 = std::string("{\"messages\":\"") + '\xFF' + "\"}";
  for (const std::string& body :
       {std::string(), std::string("{"), std::string("nonsense"), std::string("[]"), std::string("5"),
        std::string("null"), std::string(R"({"a":NaN})"), std::string(R"({"a":1e999})"),
        std::string(R"({"a":"\ud800"})"), not_utf8, std::string(R"({"a":1}x)"), std::string(100'000, '['),
        R"({"a":)" + std::string(70, '[') + std::string(70, ']') + "}"})
    expect_body_refused(body, "");
}

TEST(CompletionRequest, Prompts) {
  EXPECT_EQ(completion(R"({"prompt":"hi"})").prompts.at(0).text, "hi");
  EXPECT_EQ(completion(R"({"prompt":["a","b"]})").prompts.at(1).text, "b");
  EXPECT_EQ(completion(R"({"prompt":[1,2,999]})").prompts.at(0).tokens, (std::vector<Token>{1, 2, 999}));
  const auto both = completion(R"({"prompt":[[1,2],"x"],"logprobs":3,"echo":false})");
  EXPECT_TRUE(both.prompts.at(0).is_tokens);
  EXPECT_FALSE(both.prompts.at(1).is_tokens);
  EXPECT_EQ(both.logprobs, 3);
  for (const char* body :
       {R"({})", R"({"prompt":5})", R"({"prompt":[]})", R"({"prompt":[1,1000]})", R"({"prompt":[1,-1]})",
        R"({"prompt":[1,"a"]})", R"({"prompt":[["a"]]})", R"({"prompt":[1.5]})"}) {
    ApiError error;
    expect_refused(parse_completion(body, kDefaults, error), error, "prompt", body);
  }
  ApiError error;
  const auto echoed = parse_completion(R"({"prompt":"x","echo":true,"logprobs":1})", kDefaults, error);
  ASSERT_TRUE(echoed);
  EXPECT_FALSE(echoed->cache_prompt);
}

TEST(SmallRequests, ReadAndRefuse) {
  ApiError error;
  const auto t = parse_tokenize(R"({"content":"a","add_special":true,"with_pieces":true})", error);
  ASSERT_TRUE(t.has_value());
  EXPECT_TRUE(t->add_special && t->with_pieces && t->parse_special);
  EXPECT_FALSE(parse_tokenize("{}", error));
  EXPECT_EQ(parse_detokenize(R"({"tokens":[3,4]})", 5, error), (std::vector<Token>{3, 4}));
  EXPECT_FALSE(parse_detokenize(R"({"tokens":[5]})", 5, error));
  EXPECT_FALSE(parse_detokenize(R"({"tokens":5})", 5, error));
  EXPECT_FALSE(parse_detokenize("{}", 5, error));
  EXPECT_EQ(parse_file_name(R"({"filename":"x"})", error), "x");
  EXPECT_FALSE(parse_file_name(R"({"filename":5})", error));
  EXPECT_FALSE(parse_file_name("{}", error));
}

// nlohmann's own parser took 8 s for 80,000 keys, and 100 s for these.
// docs/server_api.md: "A request has at most 1,000,000 fields, of all its objects together"
TEST(Body, ManyFieldsAreReadInLinearTime) {
  std::string many = "{";
  for (int i = 0; i < 250'000; ++i) many += "\"key" + std::to_string(i) + "\":" + std::to_string(i) + ",";
  ApiError error;
  const Clock::time_point begin = Clock::now();
  const auto json = parse_object(many + R"("key7":"again","last":{"a":[]}})", error);
  EXPECT_LT(seconds_since(begin), 10);
  ASSERT_TRUE(json.has_value()) << error.message;
  EXPECT_EQ(json->size(), 250'001U);
  EXPECT_EQ(std::next(json->begin(), 7).key(), "key7");
  EXPECT_EQ(json->at("key7"), "again");
  EXPECT_EQ(std::prev(json->end()).key(), "last");
  std::string more = "{\"list\":[";
  for (int i = 0; i < 500'001; ++i) more += R"({"a":0,"b":0},)";
  EXPECT_FALSE(parse_object(more + "0]}", error).has_value());
  EXPECT_EQ(error.message, "the request has more than 1000000 fields");
}

TEST(Body, IsTheTreeThatNlohmannMakes) {
  for (const char* text : {R"({"b":1,"a":[1,-2,3.5,true,false,null,"x",{"":{"z":[[]],"y":{}}}],"":"e"})",
                           "{}", R"({"a":1,"b":2,"a":{"c":[1]},"b":[],"a":3})",
                           R"({"a":18446744073709551615,"b":-9223372036854775808})"}) {
    ApiError error;
    const auto json = parse_object(text, error);
    ASSERT_TRUE(json.has_value()) << error.message;
    EXPECT_EQ(json->dump(), Json::parse(text).dump());
  }
}

}  // namespace
}  // namespace narrows::server
