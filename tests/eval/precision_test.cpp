// Precision of attention kernels: the measures on heads whose answer is known, the random benchmark, and the
// heads of a tiny model.
#include "eval/precision.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

using enum PrefillAttention;
constexpr PrefillAttention kAll[] = {f32, bf16, bf16_shift, fp16, pasa, fp16_shift};

/// Two rows, two keys of head_dim 4; row 0 sees key 0 alone.
PrecisionHead small_head() {
  PrecisionHead h;
  h.head_dim = 4;
  h.n_key = 2;
  h.scale = 0.5F;
  h.q = {1, 2, 0, 0, 1, -1, 0, 0};
  h.k = {3, 1, 0, 0, 1, 1, 0, 0};
  h.v = {1, 0, 0, 0, 0, 2, 0, 0};
  h.position = {0, 1};
  return h;
}

TEST(JudgeHead, MeasuresOfAHeadByHand) {
  const std::vector<PrecisionRow> rows = judge_head(small_head(), kAll);
  ASSERT_EQ(rows.size(), std::size(kAll));
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(rows[i].kernel, kAll[i]);
    EXPECT_EQ(rows[i].rows, 2);
    EXPECT_EQ(rows[i].nan_rows, 0);
    EXPECT_EQ(rows[i].length, 2);
    // Pairs that are seen: 5 of 5, 2 of 4, 0 of 2. The mean key is (2, 1): less q.mean 4, 1, 1.
    EXPECT_EQ(rows[i].qk_max, 5);
    EXPECT_EQ(rows[i].qk_max_shifted, 1);
    EXPECT_NEAR(rows[i].resonance, (1 + 0.5 + 0) / 3, 1e-15);
    EXPECT_LT(rows[i].rmse, 2e-3) << attention_name(rows[i].kernel);
  }
  EXPECT_LT(rows[0].rmse, 1e-7);
  EXPECT_GT(rows[1].rmse, rows[0].rmse);
}

TEST(JudgeHead, RowsThatOverflowAreCountedAndLeftOut) {
  PrecisionHead h = small_head();
  h.q[4] = 60000;  // row 1: q.k of 180,000
  const std::vector<PrecisionRow> rows = judge_head(h, kAll);
  EXPECT_EQ(rows[3].nan_rows, 1);
  EXPECT_LT(rows[3].rmse, 2e-3);  // of row 0
  EXPECT_EQ(rows[0].nan_rows, 0);
  EXPECT_EQ(rows[2].nan_rows, 0);
  h.q[0] = 60000;
  EXPECT_TRUE(std::isnan(judge_head(h, std::span(kAll).subspan(3, 1))[0].rmse));
}

TEST(RandomCases, AreManyNamedAndTheSameEveryTime) {
  std::set<std::string> names;
  for (int64_t i = 0; i < random_cases(); i += 7) {
    PrecisionHead a, b;
    names.insert(random_case(i, a));
    random_case(i, b);
    EXPECT_EQ(a.q, b.q);
    EXPECT_EQ(a.k.size(), static_cast<size_t>(a.n_key * a.head_dim));
    EXPECT_EQ(a.position.front(), a.n_key);
  }
  EXPECT_EQ(names.size(), static_cast<size_t>((random_cases() + 6) / 7));
  EXPECT_GE(random_cases(), 60);
}

/// The case whose name has all these words.
std::vector<PrecisionRow> judged(const std::string& name) {
  for (int64_t i = 0; i < random_cases(); ++i) {
    PrecisionHead h;
    if (random_case(i, h) == name) return judge_head(h, kAll);
  }
  ADD_FAILURE() << "no case " << name;
  return std::vector<PrecisionRow>(std::size(kAll));
}

TEST(RandomCases, Mean30OverflowsPlainHalfAlone) {
  for (const char* name : {"uniform mean 30 amplitude 0.5 head_dim 128 length 1280",
                           "hybrid mean 30 head_dim 128 length 1280"}) {
    for (const PrecisionRow& r : judged(name)) {
      EXPECT_EQ(r.nan_rows, r.kernel == fp16 ? r.rows : 0) << attention_name(r.kernel);
      if (r.kernel != fp16) {
        EXPECT_LT(r.rmse, 0.02) << attention_name(r.kernel);
      }
      EXPECT_GT(r.qk_max, 65504);
      EXPECT_LT(r.qk_max_shifted, 5000);
      EXPECT_GT(r.resonance, 0.99);
    }
  }
}

TEST(RandomCases, WithoutAMeanTheFormatsDifferByTheirDigits) {
  const std::vector<PrecisionRow> r = judged("uniform mean 0 amplitude 5 head_dim 64 length 1280");
  EXPECT_LT(100 * r[0].rmse, r[5].rmse);  // float32, half
  EXPECT_LT(r[5].rmse, r[2].rmse);        // half, bfloat16
  EXPECT_LT(r[2].rmse, 0.02);
  // Independent coordinates: sqrt(pi / 2 / head_dim) for normal ones, 0.7 of a standard deviation here.
  EXPECT_NEAR(r[0].resonance, 1.2 / 8, 0.03);
}

TEST(MeasurePrecision, EveryLayerAndHeadOfAModelInOrder) {
  TinyModel m;
  m.architecture = "qwen2";
  m.n_layer = 3;
  const LoadedTiny tiny(m);
  PrecisionOptions options;
  options.context = 300;
  options.random = false;
  options.n_threads = 2;
  options.kernels = {f32, bf16_shift};
  const auto rows = measure_precision(tiny.model, random_tokens(300), options);
  ASSERT_OK(status_of(rows));
  ASSERT_EQ(rows->size(), static_cast<size_t>(2 * m.n_layer * m.n_head));
  for (size_t i = 0; i < rows->size(); ++i) {
    const PrecisionRow& r = (*rows)[i];
    EXPECT_EQ(r.layer, static_cast<int64_t>(i) / 2 / m.n_head);
    EXPECT_EQ(r.head, static_cast<int64_t>(i) / 2 % m.n_head);
    EXPECT_EQ(r.name, "layer " + std::to_string(r.layer) + " head " + std::to_string(r.head));
    EXPECT_EQ(r.kernel, options.kernels[i % 2]);
    EXPECT_GT(r.rows, 100);
    EXPECT_LT(r.rmse, i % 2 == 0 ? 1e-5 : 0.02) << r.name;
  }
}

TEST(MeasurePrecision, ATextThatIsTooShortIsRefused) {
  const LoadedTiny tiny(TinyModel{});
  PrecisionOptions options;
  options.random = false;
  options.context = 50;
  expect_refusal(status_of(measure_precision(tiny.model, random_tokens(20), options)),
                 StatusCode::invalid_argument, {"20", "50", "--context"});
}

}  // namespace
}  // namespace narrows::testing
