// Sampler: the draw follows the probabilities, each filter removes what it should, and the order is
// llama.cpp's.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "narrows/sampling.h"

namespace narrows {
namespace {

using ::testing::HasSubstr;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// All filters off.
SamplerOptions plain(float temperature = 1.0F) {
  SamplerOptions options;
  options.temperature = temperature;
  options.top_k = 0;
  options.top_p = 1.0F;
  options.min_p = 0.0F;
  options.seed = 42;
  return options;
}

std::unique_ptr<Sampler> make(const SamplerOptions& options) {
  Result<std::unique_ptr<Sampler>> sampler = Sampler::create(options);
  EXPECT_TRUE(sampler.ok()) << sampler.status().message();
  return std::move(sampler).value();
}

std::vector<Token> draw(const SamplerOptions& options, const std::vector<float>& logits, int n) {
  const auto sampler = make(options);
  std::vector<Token> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(*sampler->sample(logits));
  return tokens;
}

std::map<Token, int> count(const SamplerOptions& options, const std::vector<float>& logits, int n = 20'000) {
  std::map<Token, int> counts;
  for (const Token token : draw(options, logits, n)) ++counts[token];
  return counts;
}

/// log p, with p = .5 .2 .15 .1 .05 at the tokens 3 0 4 1 2: not sorted by id, so a mixed-up index shows.
std::vector<float> five_logits() {
  return {std::log(0.2F), std::log(0.1F), std::log(0.05F), std::log(0.5F), std::log(0.15F)};
}

TEST(Sampler, DrawsInProportionToTheProbabilities) {
  const int n = 20'000;
  const auto counts = count(plain(), five_logits(), n);
  double chi2 = 0;
  for (const auto& [token, p] : std::map<Token, double>{{0, .2}, {1, .1}, {2, .05}, {3, .5}, {4, .15}}) {
    const double expected = p * n;
    chi2 += std::pow(counts.at(token) - expected, 2) / expected;
  }
  EXPECT_LT(chi2, 18.5);  // 4 degrees of freedom: 1 seed in 1000 exceeds it, and the seed is fixed
}

TEST(Sampler, TemperatureSharpens) {
  const auto counts =
      count(plain(0.5F), five_logits());  // p^2: .25 / (.25 + .04 + .0225 + .01 + .0025) = .769
  EXPECT_NEAR(counts.at(3) / 20'000.0, 0.769, 0.01);
}

TEST(Sampler, SeedDecides) {
  const std::vector<float> flat(1000, 0.0F);
  SamplerOptions other = plain();
  other.seed = 43;
  EXPECT_EQ(draw(plain(), flat, 50), draw(plain(), flat, 50));
  EXPECT_NE(draw(plain(), flat, 50), draw(other, flat, 50));
}

TEST(Sampler, FiltersKeepTheLikeliest) {
  SamplerOptions top_k = plain();
  top_k.top_k = 2;
  EXPECT_EQ(count(top_k, five_logits()).size(), 2U);
  SamplerOptions top_p = plain();
  top_p.top_p = 0.8F;  // .5 + .2 + .15
  EXPECT_EQ(count(top_p, five_logits()).size(), 3U);
  SamplerOptions min_p = plain();
  min_p.min_p = 0.25F;  // at least .125
  EXPECT_EQ(count(min_p, five_logits()).size(), 3U);
}

TEST(Sampler, FiltersComeBeforeTheTemperature) {
  // At temperature 100 all five are about as likely: applied first, it would let top-p and min-p keep them
  // all.
  SamplerOptions options = plain(100.0F);
  options.top_p = 0.45F;
  EXPECT_EQ(count(options, five_logits()).size(), 1U);
  options.top_p = 1.0F;
  options.min_p = 0.35F;
  EXPECT_EQ(count(options, five_logits()).size(), 2U);
}

TEST(Sampler, GreedyTakesTheFirstOfTheLargest) {
  const auto greedy = make(plain(0.0F));
  EXPECT_EQ(*greedy->sample(std::vector<float>{1, 3, 3, 2}), 1);
  EXPECT_EQ(*greedy->sample(std::vector<float>{-5, -kInf, -4}), 2);
  EXPECT_EQ(*greedy->sample(std::vector<float>{-kInf, -1e30F}), 1);
}

TEST(Sampler, PenaltyLooksBackAsFarAsItShould) {
  for (const float temperature : {0.0F, 0.01F}) {
    SamplerOptions options = plain(temperature);
    options.repeat_penalty = 4.0F;
    options.repeat_last_n = 2;
    const auto sampler = make(options);
    const std::vector<float> logits = {-3, 8, 4, -2};
    EXPECT_EQ(*sampler->sample(logits), 1);  // sample() alone does not count as emitted
    EXPECT_EQ(*sampler->sample(logits), 1);
    sampler->accept(1);  // 8 / 4 < 4
    EXPECT_EQ(*sampler->sample(logits), 2);
    sampler->accept(0);
    EXPECT_EQ(*sampler->sample(logits), 2);
    sampler->accept(0);  // 1 is out of the window of 2
    EXPECT_EQ(*sampler->sample(logits), 1);
  }
}

TEST(Sampler, RefusesLogitsThatAreNoNumbers) {
  for (const float temperature : {0.0F, 1.0F}) {
    const auto sampler = make(plain(temperature));
    for (const std::vector<float>& bad :
         {std::vector<float>{1, kNaN, 2}, {kNaN, 1}, {1, kInf}, {-kInf, -kInf}, std::vector<float>{}}) {
      const Result<Token> token = sampler->sample(bad);
      EXPECT_EQ(token.status().code(), StatusCode::non_finite);
    }
    EXPECT_EQ(*sampler->sample(std::vector<float>{-kInf, 0, -kInf}), 1);  // a mask is fine
  }
}

TEST(Sampler, RefusesNumbersOutOfRange) {
  const auto refusal = [](auto member, auto value) {
    SamplerOptions options;
    options.*member = value;
    const auto sampler = Sampler::create(options);
    EXPECT_EQ(sampler.status().code(), StatusCode::invalid_argument) << value;
    return sampler.status().message();
  };
  for (const float bad : {-0.1F, kNaN, kInf, 101.0F, 1e-9F}) {
    EXPECT_THAT(refusal(&SamplerOptions::temperature, bad), HasSubstr("temperature is"));
  }
  for (const float bad : {-0.1F, 1.1F, kNaN}) {
    EXPECT_THAT(refusal(&SamplerOptions::top_p, bad), HasSubstr("top-p is"));
    EXPECT_THAT(refusal(&SamplerOptions::min_p, bad), HasSubstr("from 0 to 1"));
  }
  for (const float bad : {0.0F, -1.0F, kNaN, kInf}) refusal(&SamplerOptions::repeat_penalty, bad);
  refusal(&SamplerOptions::top_k, -1);
  refusal(&SamplerOptions::repeat_last_n, -1);
  refusal(&SamplerOptions::repeat_last_n, 1 << 21);
  // libllama would replace this seed by one of its own.
  EXPECT_THAT(refusal(&SamplerOptions::seed, 4294967295U), HasSubstr("4294967294"));
}

TEST(Sampler, SmallestTemperatureIsStillADraw) {
  // Guards the lower limit: divided by it, logits as large as models have must stay numbers.
  EXPECT_EQ(count(plain(0.001F), {1e5F, -1e5F, 99990.0F}, 100).size(), 1U);
}

}  // namespace
}  // namespace narrows
