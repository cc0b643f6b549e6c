// Grammars and biases: what is drawn follows them whatever the logits say; what is no grammar is refused, and
// nothing is printed.
#include "sample/grammar.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "narrows/sampling.h"
#include "temp_dir.h"
#include "text/tiny_vocabulary.h"

namespace narrows {
namespace {

using ::testing::HasSubstr;

/// 258 tokens: the bytes, the end (256), "he" (257).
const Tokenizer& tokenizer() {
  static const testing::TempDir dir;
  static const std::unique_ptr<Tokenizer> loaded = [] {
    EXPECT_TRUE(testing::TinyVocabulary().write(dir.path("v.gguf")));
    return std::move(Tokenizer::load(dir.path("v.gguf")).value());
  }();
  return *loaded;
}

std::unique_ptr<Sampler> make(const SamplerOptions& options) {
  Result<std::unique_ptr<Sampler>> sampler = Sampler::create(options, &tokenizer());
  EXPECT_TRUE(sampler.ok()) << sampler.status().message();
  return std::move(sampler).value();
}

/// Text drawn from random logits until the end or n tokens.
std::string write(const std::string& grammar, float temperature, uint32_t seed, int n = 200) {
  SamplerOptions options;
  options.temperature = temperature;
  options.seed = seed;
  options.grammar = grammar;
  const auto sampler = make(options);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 3);
  std::string text;
  for (int i = 0; i < n; ++i) {
    std::vector<float> logits(258);
    for (float& x : logits) x = normal(random);
    logits[256] += 4;  // so that it ends where it may
    for (int byte = 128; byte < 256; ++byte) logits[static_cast<size_t>(byte)] = -30;  // parts of characters
    const Result<Token> token = sampler->sample(logits);
    EXPECT_TRUE(token.ok()) << token.status().message() << " after " << text;
    if (!token.ok() || tokenizer().is_end(*token)) break;
    sampler->accept(*token);
    text += tokenizer().piece(*token);
  }
  return text;
}

TEST(Grammar, IsFollowedAtAnyTemperature) {
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    const float temperature = seed % 2 == 0 ? 0.0F : 1.0F;
    EXPECT_THAT(write(R"(root ::= "yes" | "no")", temperature, seed), ::testing::AnyOf("yes", "no"));
    EXPECT_THAT(write("# a number\nroot ::= \"-\"? digit{2,3}\ndigit ::= [0-9]\n", temperature, seed),
                ::testing::MatchesRegex("-?[0-9]{2,3}"));
  }
  EXPECT_EQ(write(R"(root ::= "hehe")", 0, 3), "hehe");  // by the token "he" or by letters
}

TEST(Grammar, OfASchemaGivesItsDocuments) {
  const Result<std::string> grammar = grammar_of_schema(
      R"({"type":"object","properties":{"name":{"type":"string","maxLength":4},"age":{"type":"integer"},
          "kind":{"enum":["cat","dog"]}},"required":["name","age","kind"],"additionalProperties":false})");
  ASSERT_TRUE(grammar.ok()) << grammar.status().message();
  for (uint32_t seed = 1; seed <= 12; ++seed) {
    const std::string text = write(*grammar, 1.0F, seed, 400);
    const auto json = nlohmann::json::parse(text, nullptr, false);
    ASSERT_TRUE(json.is_object()) << text;
    EXPECT_TRUE(json["name"].is_string() && json["age"].is_number_integer()) << text;
    EXPECT_TRUE(json["kind"] == "cat" || json["kind"] == "dog") << text;
  }
}

TEST(Grammar, RefusesWhatIsNone) {
  const auto reason = [](const std::string& grammar) {
    ::testing::internal::CaptureStderr();
    ::testing::internal::CaptureStdout();
    SamplerOptions options;
    options.grammar = grammar;
    const Status s = Sampler::create(options, &tokenizer()).status();
    EXPECT_EQ(::testing::internal::GetCapturedStderr() + ::testing::internal::GetCapturedStdout(), "")
        << grammar;
    EXPECT_EQ(s.code(), StatusCode::invalid_argument) << grammar.substr(0, 50);
    EXPECT_EQ(s.message().find('\n'), std::string::npos);
    return s.message();
  };
  EXPECT_THAT(reason("start ::= \"a\""), HasSubstr("root"));
  EXPECT_THAT(reason("root ::= other"), HasSubstr("other"));
  EXPECT_THAT(reason("root ::= \"a"), HasSubstr("unexpected end"));
  EXPECT_THAT(reason("root ::= [a-"), HasSubstr("unexpected end"));
  EXPECT_THAT(reason("this is no grammar"), HasSubstr("expecting"));
  EXPECT_THAT(reason("root ::= root \"a\""), HasSubstr("recursion"));
  EXPECT_THAT(reason("root ::= \"a\"{5000}"), HasSubstr("repetition"));
  EXPECT_THAT(reason("root ::= " + std::string(100'000, '(')), HasSubstr("nested"));
  EXPECT_THAT(reason(std::string(2'000'000, 'a')), HasSubstr("bytes"));
  EXPECT_THAT(reason(std::string("root ::= \"a\"\0", 13)), HasSubstr("zero byte"));
  EXPECT_THAT(reason("root ::= <[5]>"), HasSubstr("refers to a token"));
  reason("\n \t# only a remark");
}

// The parser would make copies of these until the memory ends.
TEST(Grammar, RefusesRepetitionsThatNeverEnd) {
  const auto refusal = [](const std::string& gbnf) { return check_grammar(gbnf).message(); };
  EXPECT_THAT(refusal(R"(root ::= "a"{5,2})"), HasSubstr("{5,2} ends before it begins"));
  EXPECT_THAT(refusal("root ::= [a-z]{ 5 ,\n 4 }"), HasSubstr("{5,4} ends before it begins"));
  EXPECT_THAT(refusal(R"(root ::= "a"{,5})"), HasSubstr("{m,n}"));
  EXPECT_THAT(refusal("root ::= \"" + std::string(10'000, 'a') + "\"{1500}"), HasSubstr("too many"));
  EXPECT_THAT(refusal(R"(root ::= "a"{1000}{1000}{1000})"), HasSubstr("too many"));
  for (const char* good : {R"(root ::= "{5,2}" [{5,2}\]] "a"{2,5} # {5,2})",
                           R"(root ::= ("ab" | "c"){0,20} [0-9]{3} "x"{2,})", R"(root ::= "a"{0,1000000})"})
    EXPECT_TRUE(check_grammar(good).ok()) << good << ": " << refusal(good);
  EXPECT_FALSE(
      grammar_of_schema(R"({"type":"array","items":{"type":"integer"},"minItems":5,"maxItems":2})").ok());
}

TEST(Grammar, RefusesSchemasThatAreNone) {
  const auto reason = [](const std::string& schema) {
    const auto grammar = grammar_of_schema(schema);
    EXPECT_EQ(grammar.status().code(), StatusCode::invalid_argument) << schema;
    return grammar.status().message();
  };
  reason("{");
  reason(R"({"type":"nonsense"})");
  reason(R"({"$ref":"#/definitions/none"})");
  reason(R"({"$ref":"https://example.com/schema.json"})");
  reason(R"({"type":"string","minLength":100000})");
  EXPECT_TRUE(grammar_of_schema(R"({"type":"object"})").ok());
  EXPECT_TRUE(grammar_of_schema("{}").ok());
}

// A grammar that leads where no token goes on.
TEST(Grammar, SaysWhenNoTokenFits) {
  SamplerOptions options;
  options.temperature = 0;
  options.grammar = R"(root ::= "\u20ac" "x")";  // three bytes, each a token
  const auto sampler = make(options);
  std::vector<float> logits(258, 0.0F);
  for (float& x : logits) x = -std::numeric_limits<float>::infinity();
  logits['q'] = 1;  // the only one that the model would say
  const Result<Token> token = sampler->sample(logits);
  EXPECT_EQ(token.status().code(), StatusCode::invalid_argument);
  EXPECT_THAT(token.status().message(), HasSubstr("grammar"));
}

// Each "[" has three times the ways of the one before.
TEST(Grammar, EndsWhenItBecomesTooAmbiguous) {
  SamplerOptions options;
  options.temperature = 0;
  options.grammar = "root ::= a\na ::= \"[\" a \"x\" | \"[\" a \"y\" | \"[\" a \"z\" | \"q\"";
  const auto sampler = make(options);
  std::vector<float> logits(258, 0.0F);
  logits['['] = 5;
  int n = 0;
  Result<Token> token = sampler->sample(logits);
  for (; token.ok() && n < 30; ++n) {
    EXPECT_EQ(*token, '[');
    sampler->accept(*token);
    token = sampler->sample(logits);
  }
  EXPECT_EQ(n, 6);  // four times 3 to the power of 7 ways would be more than 4000
  EXPECT_EQ(token.status().code(), StatusCode::invalid_argument);
  EXPECT_THAT(token.status().message(), HasSubstr("too ambiguous"));
}

TEST(Grammar, NeedsATokenizer) {
  SamplerOptions options;
  options.grammar = "root ::= \"a\"";
  EXPECT_EQ(Sampler::create(options).status().code(), StatusCode::invalid_argument);
}

TEST(LogitBias, ForbidsAndForces) {
  SamplerOptions options;
  options.temperature = 0;
  std::vector<float> logits(258, 0.0F);
  logits['a'] = 5;
  logits['b'] = 4;
  EXPECT_EQ(*make(options)->sample(logits), 'a');
  options.logit_bias = {{'a', -std::numeric_limits<float>::infinity()}};
  EXPECT_EQ(*make(options)->sample(logits), 'b');
  options.logit_bias = {{'c', 100}};
  EXPECT_EQ(*make(options)->sample(logits), 'c');
  options.temperature = 1;
  EXPECT_EQ(*make(options)->sample(logits), 'c');
  for (const Token bad : {-1, 258}) {
    options.logit_bias = {{bad, 1}};
    EXPECT_EQ(Sampler::create(options, &tokenizer()).status().code(), StatusCode::invalid_argument);
  }
  options.logit_bias = {{'a', std::numeric_limits<float>::quiet_NaN()}};
  EXPECT_EQ(Sampler::create(options, &tokenizer()).status().code(), StatusCode::invalid_argument);
}

TEST(Penalties, PresenceOnceFrequencyEachTime) {
  SamplerOptions options;
  options.temperature = 0;
  std::vector<float> logits(258, -10.0F);
  logits['a'] = 5;
  logits['b'] = 3.5F;
  const auto after = [&](float presence, float frequency, int times, bool in_prompt) {
    options.presence_penalty = presence;
    options.frequency_penalty = frequency;
    const auto sampler = make(options);
    for (int i = 0; i < times; ++i) in_prompt ? sampler->accept_prompt('a') : sampler->accept('a');
    return *sampler->sample(logits);
  };
  for (const bool in_prompt : {false, true}) {
    EXPECT_EQ(after(1, 0, 5, in_prompt), 'a');
    EXPECT_EQ(after(2, 0, 1, in_prompt), 'b');
    EXPECT_EQ(after(0, 1, 1, in_prompt), 'a');
    EXPECT_EQ(after(0, 1, 2, in_prompt), 'b');
    EXPECT_EQ(after(-2, 0, 1, in_prompt), 'a');
  }
}

}  // namespace
}  // namespace narrows
