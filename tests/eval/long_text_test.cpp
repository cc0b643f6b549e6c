// The long text: what f16 writes is what it would write alone, and KL by position is that of sessions fed the
// same tokens.
#include "eval/long_text.h"

#include <gtest/gtest.h>

#include <limits>

#include "narrows/sampling.h"
#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

const LoadedTiny& tiny() {
  static const LoadedTiny loaded{TinyModel()};
  return loaded;
}

LongTextOptions options() {
  LongTextOptions o;
  o.context = 200;
  o.tokens = 40;
  o.n_bucket = 4;
  o.profiles = {kv("kivi-4"), kv("kivi-2")};
  o.n_threads = 1;
  o.prompt = {PrefillProducts::int8, PrefillAttention::f32};
  return o;
}

TEST(LongText, KlIsThatOfSessionsThatAreFedTheText) {
  const LongTextOptions o = options();
  const auto text = random_tokens(500);
  const auto result = measure_long_text(tiny().model, text, o);
  ASSERT_TRUE(result.ok()) << result.status().message();
  ASSERT_EQ(result->rows.size(), 2U);

  auto f16 = make_session(tiny().model), kivi = make_session(tiny().model, {.kv = "kivi-2"});
  ASSERT_OK(f16->prefill(std::span(text).first(200)));
  ASSERT_OK(kivi->prefill(std::span(text).first(200)));
  const Tokenizer& tokenizer = tiny().model->tokenizer();
  SamplerOptions so;
  so.temperature = o.temperature;
  so.seed = o.seed;
  for (Token t = 0; t < tokenizer.n_vocab(); ++t) {
    if (tokenizer.is_end(t)) so.logit_bias.push_back({t, -std::numeric_limits<float>::infinity()});
  }
  ASSERT_FALSE(so.logit_bias.empty());
  const auto sampler = Sampler::create(so, &tokenizer);
  ASSERT_TRUE(sampler.ok());
  std::vector<Token> written;
  std::vector<double> kl;
  double same = 0;
  for (int i = 0; i < 40; ++i) {
    written.push_back(*(*sampler)->sample(f16->logits()));
    (*sampler)->accept(written.back());
    ASSERT_OK(f16->decode(written.back()));
    ASSERT_OK(kivi->decode(written.back()));
    kl.push_back(kl_divergence(f16->logits(), kivi->logits()));
    same += argmax(f16->logits()) == argmax(kivi->logits()) ? 1 : 0;
  }
  Utf8Stream stream;
  std::string wrote = stream.push(tokenizer.decode(written));
  wrote += stream.flush();
  EXPECT_EQ(result->texts, std::vector<std::string>{wrote});
  const LongTextRow& row = result->rows[1];
  EXPECT_EQ(row.kv, "kivi-2");
  ASSERT_EQ(row.buckets.size(), 4U);
  double all = 0;
  for (size_t b = 0; b < 4; ++b) {
    double sum = 0;
    for (size_t i = 10 * b; i < 10 * b + 10; ++i) sum += kl[i];
    all += sum;
    EXPECT_EQ(row.buckets[b].from, static_cast<int64_t>(10 * b));
    EXPECT_EQ(row.buckets[b].to, static_cast<int64_t>(10 * b + 10));
    EXPECT_NEAR(row.buckets[b].kl, sum / 10, 1e-9);
  }
  EXPECT_NEAR(row.kl_mean, all / 40, 1e-9);
  EXPECT_GT(row.kl_mean, 0);
  EXPECT_NEAR(row.top1, same / 40, 1e-9);
}

TEST(LongText, SamplesGoOnFromDifferentPartsOfTheText) {
  LongTextOptions o = options();
  o.samples = 2;
  o.tokens = 10;
  const auto text = random_tokens(500);
  const auto both = measure_long_text(tiny().model, text, o);
  ASSERT_TRUE(both.ok());
  ASSERT_EQ(both->texts.size(), 2U);
  EXPECT_NE(both->texts[0], both->texts[1]);
  const auto again = measure_long_text(tiny().model, text, o);
  EXPECT_EQ(again->texts, both->texts);
  EXPECT_EQ(again->rows[0].kl_mean, both->rows[0].kl_mean);
}

TEST(LongText, DriftIsTheLastHalfOverTheFirst) {
  std::vector<double> flat(400, 0.01), twice(400, 0.01), noisy(400);
  for (size_t i = 200; i < 400; ++i) twice[i] = 0.02;
  for (size_t i = 0; i < 400; ++i) noisy[i] = 0.01 + 0.01 * static_cast<double>(i * 7919 % 13);
  Drift d = drift_of({&flat, 1});
  EXPECT_DOUBLE_EQ(d.ratio, 1);
  EXPECT_DOUBLE_EQ(d.low, 1);
  d = drift_of({&twice, 1});
  EXPECT_NEAR(d.ratio, 2, 1e-12);
  EXPECT_NEAR(d.high, 2, 1e-12);
  d = drift_of({&noisy, 1});
  EXPECT_LT(d.low, 1);
  EXPECT_GT(d.high, 1);
  const std::vector<double> none(400, 0.0);
  EXPECT_EQ(drift_of({&none, 1}).ratio, 1);
}

TEST(LongText, Refusals) {
  const auto text = random_tokens(150);
  expect_refusal(measure_long_text(tiny().model, text, options()).status(), StatusCode::invalid_argument,
                 {"150", "200", "--context"});
  LongTextOptions o = options();
  o.profiles.clear();
  expect_refusal(measure_long_text(tiny().model, text, o).status(), StatusCode::invalid_argument,
                 {"profile"});
  o = options();
  o.context = 100;
  EXPECT_EQ(measure_long_text(tiny().model, text, o, [](double) { return false; }).status().code(),
            StatusCode::cancelled);
}

}  // namespace
}  // namespace narrows::testing
