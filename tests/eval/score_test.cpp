// Scorers against answers worked out by hand, and the paired interval against its definition.
#include "eval/task/score.h"

#include <gtest/gtest.h>

#include <cmath>

#include "eval/task/paired.h"
#include "support/refusal.h"

namespace narrows::testing {
namespace {

double score(Score how, std::string_view answer, const std::vector<std::string>& expected) {
  return score_answer(how, answer, expected);
}

TEST(Score, ContainsAllIsTheShareOfWhatIsContained) {
  const std::vector<std::string> expected = {"1234567", "Oak", "fox", "7654321"};
  EXPECT_EQ(score(Score::contains_all, "It is 1234567 and the OAK.", expected), 0.5);
  EXPECT_EQ(score(Score::contains_all, "1234567, oak, Fox, 7654321", expected), 1);
  EXPECT_EQ(score(Score::contains_all, "x12345678x", {"1234567"}), 1);  // as RULER does: anywhere
  EXPECT_EQ(score(Score::contains_all, "", expected), 0);
  EXPECT_EQ(score(Score::contains_all, "anything", {}), 0);
}

TEST(Score, ContainsAnyIsAllOrNothing) {
  EXPECT_EQ(score(Score::contains_any, "a grey fox", {"wolf", "FOX"}), 1);
  EXPECT_EQ(score(Score::contains_any, "a grey cat", {"wolf", "fox"}), 0);
}

TEST(Score, ExactIgnoresCasePunctuationAndArticles) {
  EXPECT_EQ(score(Score::exact, " The  Eiffel Tower.\n", {"eiffel tower"}), 1);
  EXPECT_EQ(score(Score::exact, "Eiffel Tower, Paris", {"Eiffel Tower"}), 0);
  EXPECT_EQ(score(Score::exact,
                  "\xC3\x9C"
                  "berall",
                  {"\xC3\x9C"
                   "berall!"}),
            1);
  EXPECT_EQ(score(Score::exact, "B", {"a different one", "b"}), 1);  // the best of the expected
}

TEST(Score, F1CountsWordsAsOftenAsBothHaveThem) {
  // Common: cat, sat (twice against once: once). Precision 2 of 4, recall 2 of 3.
  EXPECT_DOUBLE_EQ(score(Score::f1, "cat sat sat down", {"the cat sat there"}), 2.0 * 2 / (4 + 3));
  EXPECT_EQ(score(Score::f1, "dog", {"the cat"}), 0);
  EXPECT_EQ(score(Score::f1, "", {"the cat"}), 0);
  EXPECT_EQ(score(Score::f1, "the cat", {"a", "Cat"}), 1);
}

TEST(Score, RougeLIsTheLongestCommonSubsequence) {
  // "police killed the gunman" and "police kill the gunman": police, the, gunman: 3 of 4 and 4 (Lin 2004).
  EXPECT_DOUBLE_EQ(score(Score::rouge_l, "police kill the gunman", {"police killed the gunman"}), 0.75);
  // "the gunman kill police": the gunman, 2 of 4.
  EXPECT_DOUBLE_EQ(score(Score::rouge_l, "the gunman kill police", {"police killed the gunman"}), 0.5);
  EXPECT_DOUBLE_EQ(score(Score::rouge_l, "a b c d e", {"b-d"}), 2.0 * 2 / (5 + 2));
  EXPECT_EQ(score(Score::rouge_l, "", {"b"}), 0);
}

TEST(Score, TheFinalNumberOfAWorkedAnswer) {
  const auto number = [](std::string_view text) { return final_number(text).value_or("none"); };
  EXPECT_EQ(number("16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18"), "18");
  EXPECT_EQ(number("#### 18 dollars, of 20"), "18");
  EXPECT_EQ(number("She makes $1,200.50 a day."), "1200.5");
  EXPECT_EQ(number("The answer is 18.00."), "18");
  EXPECT_EQ(number("It fell to -007"), "-7");
  EXPECT_EQ(number("16-3"), "3");  // no sign, a difference
  EXPECT_EQ(number("(2)-3"), "3");
  EXPECT_EQ(number("1,2,3"), "3");
  EXPECT_EQ(number("1,234,567"), "1234567");
  EXPECT_EQ(number("1,2345"), "2345");
  EXPECT_EQ(number("of .50"), "0.5");
  EXPECT_EQ(number("-0.0"), "0");
  EXPECT_EQ(number("none at all"), "none");
  EXPECT_EQ(number("####"), "none");
  EXPECT_EQ(number("7 ####"), "7");
  EXPECT_EQ(number("99999999999999999999999999999"), "99999999999999999999999999999");
}

TEST(Score, NumbersAreComparedAsNumbers) {
  EXPECT_EQ(score(Score::number, "So he pays $1,200.00.", {"5 * 240 = 1200\n#### 1200"}), 1);
  EXPECT_EQ(score(Score::number, "1200 and then 5", {"1200"}), 0);
  EXPECT_EQ(score(Score::number, "no idea", {"no number"}), 0);
}

TEST(Score, NamesGoThereAndBack) {
  for (const std::string& name : score_names()) EXPECT_EQ(score_name(*parse_score(name)), name);
  expect_refusal(parse_score("bleu").status(), StatusCode::invalid_argument,
                 {"bleu", "contains-all", "rouge-l"});
}

TEST(Paired, CountsAndMeanOfTheStrata) {
  const std::vector<std::vector<double>> d = {{0, -1, 1, -0.5}, {}, {0, 0.5}};
  const PairedDifference p = paired_difference(d);
  EXPECT_DOUBLE_EQ(p.mean, (-0.125 + 0.25) / 2);
  EXPECT_EQ(p.better, 2);
  EXPECT_EQ(p.worse, 2);
  EXPECT_FALSE(p.exact);
  EXPECT_LE(p.low, p.mean);
  EXPECT_GE(p.high, p.mean);
  EXPECT_EQ(paired_difference(d).low, p.low);  // the same every time
}

// 12 of 100 worse, 2 better: the mean's standard error is sqrt(.14 - .01)/10 = .0361, the bootstrap is near
// it.
TEST(Paired, TheBootstrapIsNearTheNormalInterval) {
  std::vector<double> d(100, 0.0);
  for (size_t i = 0; i < 12; ++i) d[i] = -1;
  d[20] = d[21] = 1;
  const PairedDifference p = paired_difference({&d, 1});
  EXPECT_NEAR(p.low, -0.1 - 1.96 * 0.0361, 0.015);
  EXPECT_NEAR(p.high, -0.1 + 1.96 * 0.0361, 0.015);
}

TEST(Paired, OneQuestionATaskIsNotCertaintyEither) {
  const std::vector<std::vector<double>> d = {{0}, {-0.5}, {0}, {0.25}};
  const PairedDifference p = paired_difference(d);
  EXPECT_TRUE(p.exact);
  EXPECT_DOUBLE_EQ(p.mean, -0.0625);
  const double share = 1 - std::pow(0.025, 0.25);
  EXPECT_NEAR(p.low, -0.0625 - share * 0.9375, 1e-12);
  EXPECT_NEAR(p.high, -0.0625 + share * 1.0625, 1e-12);
}

TEST(Paired, NoChangeAtAllIsNotCertainty) {
  const std::vector<double> d(50, 0.0);
  const PairedDifference p = paired_difference({&d, 1});
  EXPECT_TRUE(p.exact);
  EXPECT_EQ(p.mean, 0);
  // Clopper and Pearson for 0 of 50: (1 - high)^50 = .025.
  EXPECT_NEAR(std::pow(1 - p.high, 50), 0.025, 1e-12);
  EXPECT_NEAR(p.low, -p.high, 1e-12);
  EXPECT_EQ(paired_difference({}).high, 0);
}

}  // namespace
}  // namespace narrows::testing
