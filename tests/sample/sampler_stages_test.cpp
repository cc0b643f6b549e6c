// The stages of a draw beyond the plain filters, and grammars that begin to hold where a word says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

#include "narrows/sampling.h"
#include "sample/grammar_trigger.h"
#include "temp_dir.h"
#include "text/tiny_vocabulary.h"

namespace narrows {
namespace {

const Tokenizer& tokenizer() {
  static const testing::TempDir dir;
  static const std::unique_ptr<Tokenizer> loaded = [] {
    EXPECT_TRUE(testing::TinyVocabulary().write(dir.path("v.gguf")));
    return std::move(Tokenizer::load(dir.path("v.gguf")).value());
  }();
  return *loaded;
}

constexpr Token kEnd = 256;

SamplerOptions plain() {
  SamplerOptions o;
  o.temperature = 1;
  o.top_k = 0;
  o.top_p = 1;
  o.min_p = 0;
  o.seed = 5;
  return o;
}

std::unique_ptr<Sampler> make(const SamplerOptions& options) {
  auto sampler = Sampler::create(options, &tokenizer());
  EXPECT_TRUE(sampler.ok()) << sampler.status().message();
  return std::move(sampler).value();
}

/// Which of five tokens of probabilities .5 .2 .15 .1 .05 are ever drawn.
std::set<Token> drawn(const SamplerOptions& options) {
  std::vector<float> logits(258, -INFINITY);
  const float p[] = {0.5F, 0.2F, 0.15F, 0.1F, 0.05F};
  for (size_t i = 0; i < 5; ++i) logits[i] = std::log(p[i]);
  const auto sampler = make(options);
  std::set<Token> tokens;
  for (int i = 0; i < 500; ++i) tokens.insert(*sampler->sample(logits));
  return tokens;
}

TEST(Stages, EachTakesAwayWhatItShould) {
  EXPECT_EQ(drawn(plain()).size(), 5U);
  SamplerOptions o = plain();
  o.xtc_probability = 1;  // of those above the threshold the least likely stays
  o.xtc_threshold = 0.12F;
  EXPECT_EQ(drawn(o), (std::set<Token>{2, 3, 4}));
  o = plain();
  o.typical_p = 0.1F;
  EXPECT_LT(drawn(o).size(), 5U);
  o = plain();
  o.top_n_sigma = 0.1F;
  EXPECT_EQ(drawn(o), (std::set<Token>{0}));
  o = plain();
  o.mirostat = 2;
  o.mirostat_tau = 0.01F;
  EXPECT_LT(drawn(o).size(), 5U);
}

TEST(Stages, TheOrderSaysWhichAreTaken) {
  SamplerOptions o = plain();
  o.top_k = 1;
  EXPECT_EQ(drawn(o).size(), 1U);
  o.samplers = {SamplerStage::temperature};
  EXPECT_EQ(drawn(o).size(), 5U);
  o.samplers = {SamplerStage::temperature, SamplerStage::top_k};
  EXPECT_EQ(drawn(o).size(), 1U);
  EXPECT_EQ(sampler_stage("typ_p"), SamplerStage::typical_p);
  EXPECT_EQ(sampler_stage("banana"), std::nullopt);
}

TEST(Stages, DryKeepsFromRepeating) {
  SamplerOptions o = plain();
  o.temperature = 0;
  o.dry_multiplier = 10;
  o.dry_last_n = 64;
  const auto sampler = make(o);
  // "abcabcab": the next c would go on with a repetition.
  for (const char c : std::string("abcabcab")) sampler->accept_prompt(c);
  std::vector<float> logits(258, 0);
  logits['c'] = 2;
  logits['x'] = 1;
  EXPECT_EQ(*sampler->sample(logits), 'x');
  o.dry_multiplier = 0;
  const auto without = make(o);
  for (const char c : std::string("abcabcab")) without->accept_prompt(c);
  EXPECT_EQ(*without->sample(logits), 'c');
}

TEST(Stages, NoEndBeforeSoManyTokens) {
  for (const float temperature : {0.0F, 1.0F}) {
    SamplerOptions o = plain();
    o.temperature = temperature;
    o.min_tokens = 3;
    const auto sampler = make(o);
    std::vector<float> logits(258, 0);
    logits[kEnd] = 100;
    for (int i = 0; i < 3; ++i) {
      const Token token = *sampler->sample(logits);
      EXPECT_NE(token, kEnd) << i;
      sampler->accept(token);
    }
    EXPECT_EQ(*sampler->sample(logits), kEnd);
  }
}

TEST(Stages, WhatIsOutOfRangeIsRefused) {
  const auto refused = [](auto change) {
    SamplerOptions o = plain();
    change(o);
    return !Sampler::create(o, &tokenizer()).ok();
  };
  EXPECT_TRUE(refused([](auto& o) { o.typical_p = 2; }));
  EXPECT_TRUE(refused([](auto& o) { o.xtc_probability = NAN; }));
  EXPECT_TRUE(refused([](auto& o) { o.mirostat = 3; }));
  EXPECT_TRUE(refused([](auto& o) { o.min_tokens = -1; }));
  SamplerOptions dry = plain();
  dry.dry_multiplier = 1;
  EXPECT_FALSE(Sampler::create(dry).ok());  // it needs the vocabulary
}

/// The text of an answer whose model writes `wanted`, as far as the grammar lets it.
std::string written(SamplerOptions o, const std::string& wanted, size_t n) {
  o.temperature = 0;
  const auto sampler = make(o);
  std::string text;
  for (size_t i = 0; i < n; ++i) {
    std::vector<float> logits(258, 0);
    if (i < wanted.size()) logits[static_cast<unsigned char>(wanted[i])] = 5;
    logits[257] = -5;  // "he" at once
    const auto token = sampler->sample(logits);
    EXPECT_TRUE(token.ok()) << token.status().message() << " after " << text;
    if (!token.ok() || *token == kEnd) break;
    sampler->accept(*token);
    text += tokenizer().piece(*token);
  }
  return text;
}

TEST(LazyGrammar, HoldsFromItsWordOn) {
  SamplerOptions o;
  o.grammar = R"(root ::= "<call>" [0-9] "</call>")";
  o.grammar_words = {"<call>"};
  EXPECT_EQ(written(o, "Free <text>.", 12), "Free <text>.");
  EXPECT_EQ(written(o, "So: <call>x</call>", 18), "So: <call>0</call>");
  EXPECT_EQ(written(o, "So: <call>7</call> and more", 50), "So: <call>7</call>");
}

TEST(LazyGrammar, APrefixIsWhatThePromptHasOfIt) {
  SamplerOptions o;
  o.grammar = R"(root ::= "assistant: " [0-9] "!")";
  o.grammar_prefix = "assistant: ";
  EXPECT_EQ(written(o, "x!", 5), "0!");
  o.grammar_prefix = "user: ";
  EXPECT_FALSE(Sampler::create(o, &tokenizer()).ok());
}

/// What push() gives for a text that comes letter by letter: the first that is not nothing.
std::string begun(const SamplerOptions& o, const std::string& text) {
  auto trigger = GrammarTrigger::create(o);
  EXPECT_TRUE(trigger.ok());
  for (const char c : text) {
    if (const auto held = trigger->push(std::string(1, c))) return *held;
  }
  return "nothing";
}

TEST(GrammarTrigger, ThinkingBeginsNothing) {
  SamplerOptions o;
  o.grammar_words = {"<call>"};
  o.thinking_begin = "<think>";
  o.thinking_ends = {"</think>"};
  EXPECT_EQ(begun(o, "a<call>"), "<call>");
  EXPECT_EQ(begun(o, "<think><call>x"), "nothing");
  EXPECT_EQ(begun(o, "<think><call>x</think>a<call>"), "<call>");
  o.begins_thinking = true;
  EXPECT_EQ(begun(o, "<call>"), "nothing");
  EXPECT_EQ(begun(o, "<call></think><call>"), "<call>");
  o.thinking_ends = {"</think>", "<call>"};  // a call ends it
  EXPECT_EQ(begun(o, "hm<call>"), "<call>");
}

TEST(GrammarTrigger, PatternsAndTheirGroups) {
  SamplerOptions o;
  o.grammar_patterns = {"^\\s+to$", ">>>(?!all)", "<start>(\\s+to)"};
  EXPECT_EQ(begun(o, "  to"), "  to");
  EXPECT_EQ(begun(o, "x to"), "nothing");
  EXPECT_EQ(begun(o, "x<start> to"), " to");
  EXPECT_EQ(begun(o, std::string(100'000, 'x') + "<start> to"), " to");
  o.grammar_patterns = {"("};
  EXPECT_FALSE(GrammarTrigger::create(o).ok());
}

}  // namespace
}  // namespace narrows
