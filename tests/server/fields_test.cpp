// No instruction is ignored in silence: fields work, are refused by name, or are named in a warning.
#include "server/requests.h"

namespace narrows::server {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;

// docs/server_api.md: "unknown fields are named in warnings of the reply"
TEST(Fields, UnknownOnesAreNamedInWarnings) {
  const GenerationRequest r = taken(kOpenAiChat, chat_with(R"("temprature":1,"narrows":{"vk":"x"})"));
  EXPECT_THAT(r.warnings, Contains(HasSubstr("temprature")));
  EXPECT_THAT(r.warnings, Contains(HasSubstr("narrows.vk")));
  EXPECT_TRUE(taken(kOpenAiChat, chat_with(R"("temperature":1,"user":"me","store":false)")).warnings.empty());
  EXPECT_TRUE(taken(kOpenAiChat, chat_with(R"("foo":null)")).warnings.empty());
}

TEST(Fields, KnownOnesThatAreNotDoneAreRefusedByName) {
  for (const char* field : {R"("best_of":2)",
                            R"("functions":[{}])",
                            R"("function_call":"auto")",
                            R"("modalities":["audio"])",
                            R"("verbosity":"low")",
                            R"("web_search_options":{})",
                            R"("lora":[{"id":0}])",
                            R"("grammar_lazy":true)",
                            R"("response_fields":["content"])",
                            R"("return_tokens":true)",
                            R"("t_max_predict_ms":5)",
                            R"("timings_per_token":true)",
                            R"("post_sampling_probs":true)",
                            R"("allowed_token_ids":[1])",
                            R"("bad_words":["x"])",
                            R"("chat_template":"x")",
                            R"("guided_regex":"a")",
                            R"("guided_choice":["a"])",
                            R"("use_beam_search":true)",
                            R"("truncate_prompt_tokens":5)",
                            R"("prompt_logprobs":1)",
                            R"("structured_outputs":{})",
                            R"("include_stop_str_in_output":true)",
                            R"("length_penalty":2)",
                            R"("min_tokens":3,"grammar":"root ::= \"a\"")"}) {
    std::string param;
    const std::string name = std::string(field).substr(1, std::string(field).find('"', 1) - 1);
    EXPECT_THAT(refusal(kOpenAiChat, chat_with(field), &param), HasSubstr(name)) << field;
    EXPECT_EQ(param, name);
  }
  // Values that ask for what happens anyway.
  for (const char* field : {R"("best_of":1)", R"("id_slot":-1)", R"("lora":[])", R"("modalities":["text"])",
                            R"("use_beam_search":false)", R"("length_penalty":1)", R"("n_keep":5)"})
    EXPECT_EQ(refusal(kOpenAiChat, chat_with(field)), "") << field;
}

// docs/server_api.md: "-1 means what it means there: off for top_k and top_n_sigma"
TEST(Fields, SentinelsMeanWhatTheyMeanElsewhere) {
  EXPECT_EQ(taken(kOpenAiChat, chat_with(R"("top_k":-1)")).sampling.top_k, 0);
  EXPECT_EQ(taken(kOpenAiChat, chat_with(R"("max_tokens":-1)")).max_tokens, std::nullopt);
  EXPECT_EQ(taken(kOpenAiChat, chat_with(R"("repeat_last_n":-1)")).sampling.repeat_last_n, 4096);
  EXPECT_EQ(taken(kOpenAiChat, chat_with(R"("dry_penalty_last_n":-1)")).sampling.dry_last_n, 4096);
  EXPECT_LE(taken(kOpenAiChat, chat_with(R"("top_n_sigma":-1)")).sampling.top_n_sigma, 0);
}

// docs/server_api.md: "Samplers of llama.cpp: typical_p, top_n_sigma, xtc_probability and xtc_threshold"
TEST(Fields, Samplers) {
  const SamplerOptions s =
      taken(kOpenAiChat,
            chat_with(
                R"("typical_p":0.5,"xtc_probability":0.25,"xtc_threshold":0.2,"dry_multiplier":0.8,)"
                R"("dry_base":2,"dry_allowed_length":3,"dry_sequence_breakers":["x"],"mirostat":2,)"
                R"("mirostat_tau":4,"mirostat_eta":0.2,"top_n_sigma":1.5,"dynatemp_range":0.5,)"
                R"("dynatemp_exponent":2,"min_keep":2,"min_tokens":3,"samplers":["top_k","temperature"])"))
          .sampling;
  EXPECT_FLOAT_EQ(s.typical_p, 0.5F);
  EXPECT_FLOAT_EQ(s.xtc_probability, 0.25F);
  EXPECT_FLOAT_EQ(s.xtc_threshold, 0.2F);
  EXPECT_FLOAT_EQ(s.dry_multiplier, 0.8F);
  EXPECT_FLOAT_EQ(s.dry_base, 2);
  EXPECT_EQ(s.dry_allowed_length, 3);
  EXPECT_EQ(s.dry_breakers, std::vector<std::string>{"x"});
  EXPECT_EQ(s.mirostat, 2);
  EXPECT_FLOAT_EQ(s.mirostat_tau, 4);
  EXPECT_FLOAT_EQ(s.mirostat_eta, 0.2F);
  EXPECT_FLOAT_EQ(s.top_n_sigma, 1.5F);
  EXPECT_FLOAT_EQ(s.dynatemp_range, 0.5F);
  EXPECT_FLOAT_EQ(s.dynatemp_exponent, 2);
  EXPECT_EQ(s.min_keep, 2);
  EXPECT_EQ(s.min_tokens, 3);
  EXPECT_EQ(s.samplers, (std::vector<SamplerStage>{SamplerStage::top_k, SamplerStage::temperature}));
  for (const char* field : {R"("samplers":["banana"])", R"("samplers":"top_k")", R"("mirostat":3)",
                            R"("typical_p":2)", R"("xtc_probability":-1)", R"("dry_sequence_breakers":[])",
                            R"("repetition_penalty":1.1,"repeat_penalty":1.2)"})
    EXPECT_NE(refusal(kOpenAiChat, chat_with(field)), "") << field;
}

// docs/server_api.md: "Of vLLM: repetition_penalty (looks back on the whole context)", "n_probs is another
// name of top_logprobs"
TEST(Fields, WordsOfOtherServers) {
  const GenerationRequest r =
      taken(kOpenAiChat,
            chat_with(R"("repetition_penalty":1.25,"stop_token_ids":[5,6],"skip_special_tokens":false,)"
                      R"("n_probs":3)"));
  EXPECT_FLOAT_EQ(r.sampling.repeat_penalty, 1.25F);
  EXPECT_EQ(r.sampling.repeat_last_n, 4096);  // vLLM's looks back on everything
  EXPECT_EQ(r.stop_tokens, (std::vector<Token>{5, 6}));
  EXPECT_TRUE(r.show_special);
  EXPECT_EQ(r.logprobs, 3);
  EXPECT_NE(refusal(kOpenAiChat, chat_with(R"("stop_token_ids":[1000])")), "");
  EXPECT_THAT(taken(kOpenAiChat, chat_with(R"("guided_json":{"type":"object"})")).grammar, HasSubstr("root"));
}

// docs/server_api.md: "chat_template_kwargs, reasoning_effort | arguments of the template"
TEST(Fields, ArgumentsOfTheTemplate) {
  const GenerationRequest r = taken(
      kOpenAiChat,
      chat_with(R"("chat_template_kwargs":{"enable_thinking":false,"x":[1]},"reasoning_effort":"low")"));
  EXPECT_EQ(r.conversation.enable_thinking, false);
  EXPECT_EQ(r.conversation.arguments.at("x"), "[1]");
  EXPECT_EQ(r.conversation.arguments.at("reasoning_effort"), "\"low\"");
  for (const char* field : {R"("chat_template_kwargs":{"messages":[]})", R"("reasoning_effort":"huge")",
                            R"("reasoning_format":"x")"})
    EXPECT_NE(refusal(kOpenAiChat, chat_with(field)), "") << field;
}

TEST(Fields, DefaultsOfTheServer) {
  RequestDefaults d = test_defaults();
  d.sampling.temperature = 0.2F;
  d.sampling.seed = 9;
  d.has_seed = true;
  d.max_tokens = 77;
  ApiError error;
  auto r = kOpenAiChat.parse(chat_with(""), d, error);
  ASSERT_TRUE(r);
  EXPECT_FLOAT_EQ(r->sampling.temperature, 0.2F);
  EXPECT_EQ(r->sampling.seed, 9U);
  EXPECT_EQ(r->max_tokens, 77);
  r = kOpenAiChat.parse(chat_with(R"("seed":5,"max_tokens":-1,"temperature":1)"), d, error);
  ASSERT_TRUE(r);
  EXPECT_FLOAT_EQ(r->sampling.temperature, 1);
  EXPECT_EQ(r->sampling.seed, 5U);
  EXPECT_EQ(r->max_tokens, std::nullopt);
}

// docs/server_api.md: "the answer goes on with the last message, the assistant's", "so it does without the
// field, unless add_generation_prompt is given"
TEST(Fields, ALastMessageOfTheAssistantIsContinued) {
  const auto conversation = [](const std::string& fields, const char* last = "assistant") {
    return R"({"messages":[{"role":"user","content":"a"},{"role":")" + std::string(last) +
           R"(","content":"b"}])" + fields + "}";
  };
  EXPECT_TRUE(taken(kOpenAiChat, conversation("")).conversation.continue_final);
  EXPECT_TRUE(
      taken(kOpenAiChat, conversation(R"(,"continue_final_message":true,"add_generation_prompt":false)"))
          .conversation.continue_final);
  EXPECT_FALSE(
      taken(kOpenAiChat, conversation(R"(,"continue_final_message":false)")).conversation.continue_final);
  EXPECT_FALSE(
      taken(kOpenAiChat, conversation(R"(,"add_generation_prompt":true)")).conversation.continue_final);
  EXPECT_FALSE(taken(kOpenAiChat, conversation("", "user")).conversation.continue_final);
  for (const std::string& body :
       {conversation(R"(,"continue_final_message":true,"add_generation_prompt":true)"),
        conversation(R"(,"continue_final_message":true)", "user"),
        conversation(R"(,"continue_final_message":5)")})
    EXPECT_THAT(refusal(kOpenAiChat, body), HasSubstr("continue_final_message")) << body;
}

}  // namespace
}  // namespace narrows::server
