// Which experts a row goes through and what they weigh, against the same in double; and experts that no row
// or every row of a chunk chose.
#include "exec/cpu/expert_ffn.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/model_parts.h"
#include "exec/cpu/cpu_executor.h"
#include "exec/random_rows.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Choice {
  std::vector<int32_t> expert;
  std::vector<float> weight;
};

Choice choose(const std::vector<float>& logits, int64_t n_used, bool normalised = true, float scale = 1) {
  Choice c{std::vector<int32_t>(static_cast<size_t>(n_used)),
           std::vector<float>(static_cast<size_t>(n_used))};
  choose_experts({static_cast<int64_t>(logits.size()), n_used, normalised, scale}, logits.data(),
                 c.expert.data(), c.weight.data());
  return c;
}

TEST(ChooseExperts, AreTheBestAndTheirShares) {
  for (const int64_t n_expert : {1, 2, 7, 60, 128}) {
    const std::vector<float> logits = random_rows(n_expert);
    std::vector<int32_t> order(static_cast<size_t>(n_expert));
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
    });
    double all = 0;
    for (const float l : logits) all += std::exp(static_cast<double>(l));
    for (const int64_t n_used : {int64_t{1}, (n_expert + 1) / 2, n_expert}) {
      std::vector<int32_t> best(order.begin(), order.begin() + n_used);
      std::sort(best.begin(), best.end());
      double chosen = 0;
      for (const int32_t e : best) chosen += std::exp(static_cast<double>(logits[static_cast<size_t>(e)]));
      for (const bool normalised : {true, false}) {
        const Choice got = choose(logits, n_used, normalised, 2.5F);
        EXPECT_EQ(got.expert, best) << n_used << " of " << n_expert;
        for (size_t i = 0; i < best.size(); ++i) {
          const double share = std::exp(static_cast<double>(logits[static_cast<size_t>(best[i])])) /
                               (normalised ? chosen : all);
          EXPECT_NEAR(static_cast<double>(got.weight[i]), 2.5 * share, 1e-6);
        }
      }
    }
  }
}

TEST(ChooseExperts, TiesGoToTheLowerAndNumbersBeforeNone) {
  EXPECT_EQ(choose({1, 3, 3, 3, 2}, 2).expert, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(choose({0, 0, 0}, 2).expert, (std::vector<int32_t>{0, 1}));
  const float nan = std::nanf("");
  EXPECT_EQ(choose({nan, -kInfinity, nan, 5}, 2).expert, (std::vector<int32_t>{1, 3}));
  // Each once, whatever the numbers are: a prompt that overflows says so, and reads no expert that there is
  // not.
  EXPECT_EQ(choose({nan, nan, nan}, 2).expert, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(choose({nan, kInfinity, -kInfinity, nan}, 3).expert, (std::vector<int32_t>{0, 1, 2}));
  // Far apart: no weight is more than all, none is lost to a division by zero.
  const Choice far = choose({-3e38F, 3e38F, 0}, 2);
  EXPECT_EQ(far.expert, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(far.weight, (std::vector<float>{1, 0}));
}

/// Mixes nothing: what attention gives is 0.
class NoMix final : public Mixer {
 public:
  void mix(const LayerPlan& layer, const MixRows& rows, Team& team) override {
    if (team.ith() == 0) {
      for (int64_t r = 0; r < rows.n; ++r)
        std::fill_n(rows.out + r * rows.ldo, layer.mix.attention.width_q(), 0.0F);
    }
    team.barrier();
  }
};

/// n rows, all the same, through the first layer.
std::vector<float> through(const ModelParts& parts, int64_t n, int n_threads) {
  auto executor = CpuExecutor::create(parts.spec(), parts.plan, n_threads);
  EXPECT_TRUE(executor.ok());
  const std::vector<float> row = random_rows(parts.spec().n_embd);
  std::vector<float> x;
  for (int64_t i = 0; i < n; ++i) x.insert(x.end(), row.begin(), row.end());
  NoMix mixer;
  EXPECT_OK((*executor)->reserve(n, false));
  EXPECT_OK(
      (*executor)->run({{&parts.plan.layers.front(), 1}, x.data(), n, 0, &mixer, nullptr, nullptr, false}));
  return x;
}

// All rows of a chunk go through the same two of 70 experts; more threads than units of an expert.
TEST(ExpertFfn, OneExpertMayHaveAllRows) {
  TinyModel m;
  m.architecture = "qwen3moe";
  m.n_ff = 32;
  m.n_expert = 70;
  m.n_used = 2;
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_Q8_0}) {
    m.type = type;
    const LoadedTiny loaded(m);
    const ModelParts& parts = parts_of(*loaded.model);
    const std::vector<float> one = through(parts, 1, 1);
    for (const int n_threads : {1, 2, 7}) {
      for (const int64_t n : {1, 3, 64, 65, 200}) {
        const std::vector<float> got = through(parts, n, n_threads);
        for (int64_t r = 0; r < n; ++r)
          ASSERT_EQ(
              max_difference(std::span(got).subspan(static_cast<size_t>(r) * one.size(), one.size()), one), 0)
              << "row " << r << " of " << n << ", " << n_threads << " threads";
      }
    }
  }
}

TEST(ExpertFfn, SaysItsBytes) {
  const ExpertFfn::Sizes none{};
  EXPECT_EQ(ExpertFfn::bytes_needed(none, 512, 8), 0);
  const ExpertFfn::Sizes sizes{2048, 768, 128, 8};
  // Gate, up and the rounded activations of 8 experts a row, and the normed rows.
  const int64_t rows = 512 * (8 * 768 * 4 * 12 / 5 + 2048 * 4);
  EXPECT_GT(ExpertFfn::bytes_needed(sizes, 512, 2), rows);
  EXPECT_LT(ExpertFfn::bytes_needed(sizes, 512, 2), rows * 6 / 5);
}

}  // namespace
}  // namespace narrows::testing
