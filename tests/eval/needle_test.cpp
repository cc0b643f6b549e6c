// Needles: where facts go, what counts as found, and the run over a tiny model.
#include "eval/needle.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

TEST(Needle, ANumberInsideALongerOneDoesNotCount) {
  EXPECT_TRUE(names_number("48213", "48213"));
  EXPECT_TRUE(names_number("It is 48213.", "48213"));
  EXPECT_TRUE(names_number("148213 or 48213", "48213"));
  EXPECT_FALSE(names_number("148213", "48213"));
  EXPECT_FALSE(names_number("482130", "48213"));
  EXPECT_FALSE(names_number("48 213", "48213"));
  EXPECT_FALSE(names_number("", "48213"));
}

TEST(Needle, WilsonInterval) {
  // Figures of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
  const auto near = [](Interval i, double low, double high) {
    EXPECT_NEAR(i.low, low, 5e-5);
    EXPECT_NEAR(i.high, high, 5e-5);
  };
  near(wilson_interval(81, 263), 0.2553, 0.3662);
  near(wilson_interval(15, 148), 0.0624, 0.1605);
  near(wilson_interval(0, 20), 0.0, 0.1611);
  near(wilson_interval(1, 29), 0.0061, 0.1718);
  near(wilson_interval(20, 20), 1 - 0.1611, 1.0);
  near(wilson_interval(0, 0), 0.0, 1.0);
}

TEST(Needle, SentencesJoinedAreTheText) {
  const std::string text = "One. Two is 2.5 long!\nThree\n\nFour? Five";
  const std::vector<std::string> s = split_sentences(text);
  EXPECT_EQ(s, (std::vector<std::string>{"One. ", "Two is 2.5 long!\n", "Three\n\n", "Four? ", "Five\n"}));
  EXPECT_TRUE(split_sentences("").empty());
}

TEST(Needle, TrialsAreTheSameEveryTimeAndDiffer) {
  for (const NeedleKind kind : {NeedleKind::single, NeedleKind::several, NeedleKind::two_facts}) {
    const NeedleTrial a = make_needle_trial(kind, 0.25, 5), b = make_needle_trial(kind, 0.25, 5);
    EXPECT_EQ(a.facts, b.facts);
    EXPECT_EQ(a.question, b.question);
    EXPECT_NE(make_needle_trial(kind, 0.25, 6).answer, a.answer);
    EXPECT_EQ(a.answer.size(), 5U);
    EXPECT_EQ(a.depths.front(), 0.25);
    EXPECT_EQ(a.facts.size(), a.depths.size());
    // The answer stands in exactly one fact, and not in the question.
    EXPECT_EQ(std::count_if(a.facts.begin(), a.facts.end(),
                            [&](const auto& f) { return names_number(f, a.answer); }),
              1);
    EXPECT_FALSE(names_number(a.question, a.answer));
  }
  EXPECT_EQ(make_needle_trial(NeedleKind::several, 0, 1).facts.size(), 10U);
  EXPECT_NEAR(make_needle_trial(NeedleKind::two_facts, 0.75, 1).depths[1], 0.25, 1e-12);
}

const LoadedTiny& tiny() {
  static const LoadedTiny loaded{TinyModel()};
  return loaded;
}

NeedleOptions options() {
  NeedleOptions o;
  o.contexts = {700};
  o.n_depth = 3;
  o.trials = 1;
  o.profiles = {kv("f16"), kv("kivi-4")};
  o.filler = "a b c. d e f! g h i? j.";
  o.n_threads = 1;
  return o;
}

TEST(Needle, EveryProfileMeetsEveryDepth) {
  const auto rows = find_needles(tiny().model, options());
  ASSERT_TRUE(rows.ok()) << rows.status().message();
  ASSERT_EQ(rows->size(), 6U);
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ((*rows)[i].kv, i < 3 ? "f16" : "kivi-4");
    EXPECT_EQ((*rows)[i].depth, static_cast<double>(i % 3) / 2);
    EXPECT_EQ((*rows)[i].trials, 1);
    EXPECT_LE((*rows)[i].found, 1);
  }
}

TEST(Needle, Refusals) {
  NeedleOptions o = options();
  o.contexts = {60};
  expect_refusal(find_needles(tiny().model, o).status(), StatusCode::invalid_argument, {"60", "--context"});
  o = options();
  o.filler = "";
  expect_refusal(find_needles(tiny().model, o).status(), StatusCode::invalid_argument, {"filler"});
  o = options();
  o.trials = 0;
  expect_refusal(find_needles(tiny().model, o).status(), StatusCode::invalid_argument, {"trial"});
  o = options();
  const auto cancelled = find_needles(tiny().model, o, [](double) { return false; });
  EXPECT_EQ(cancelled.status().code(), StatusCode::cancelled);
}

}  // namespace
}  // namespace narrows::testing
