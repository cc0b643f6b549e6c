// RopeTable against angles computed one position at a time in double, as ggml defines them (iterated product
// of the base's root, ramp over coordinates), and against YaRN numbers worked out by hand.
#include "kernels/rope_table.h"

#include <algorithm>
#include <numbers>
#include <vector>

#include "kernels/kernel_test.h"

namespace narrows::kernels {
namespace {

struct Expected {
  double angle;
  double magnitude;
};

/// ggml's ggml_rope_cache_init and rope_yarn, in double.
std::vector<Expected> expected_at(const RopeParams& p, int64_t pos) {
  const auto corr_dim = [&](double n_turn) {
    return static_cast<double>(p.n_rot) *
           std::log(static_cast<double>(p.n_ctx_orig) / (n_turn * 2 * std::numbers::pi)) /
           (2 * std::log(p.freq_base));
  };
  std::vector<Expected> all;
  const double theta_scale = std::pow(p.freq_base, -2.0 / static_cast<double>(p.n_rot));
  double theta = static_cast<double>(pos);
  for (int64_t i0 = 0; i0 < p.n_rot; i0 += 2, theta *= theta_scale) {
    const double factor = p.freq_factors.empty() ? 1 : double{p.freq_factors[static_cast<size_t>(i0 / 2)]};
    const double extrap = theta / factor;
    const double interp = p.freq_scale * extrap;
    double mscale = p.attn_factor;
    double angle = interp;
    if (p.ext_factor != 0) {
      const double start = std::max(0.0, std::floor(corr_dim(p.beta_fast)));
      const double end = std::min(static_cast<double>(p.n_rot) - 1, std::ceil(corr_dim(p.beta_slow)));
      const double y = (static_cast<double>(i0 / 2) - start) / std::max(0.001, end - start);
      const double mix = (1 - std::min(1.0, std::max(0.0, y))) * p.ext_factor;
      angle = interp * (1 - mix) + extrap * mix;
      mscale *= 1 + 0.1 * std::log(1 / p.freq_scale);
    }
    all.push_back({angle, mscale});
  }
  return all;
}

/// 4 roundings of products whose sizes add up to at most the magnitude; the double angle itself errs by
/// pos * 2^-50 at most (the iterated product above).
void check(const RopeParams& p, int64_t n_ctx) {
  const RopeTable table(p, n_ctx);
  ASSERT_EQ(table.n_rot(), p.n_rot);
  ASSERT_EQ(table.n_ctx(), n_ctx);
  const size_t half = static_cast<size_t>(p.n_rot / 2);
  ASSERT_EQ(table.frequency().size(), half);
  for (const int64_t pos : {int64_t{0}, int64_t{1}, int64_t{255}, int64_t{256}, int64_t{257}, int64_t{4095},
                            n_ctx / 3, n_ctx / 2 + 1, n_ctx - 1}) {
    if (pos >= n_ctx) continue;
    std::vector<float> cos(half);
    std::vector<float> sin(half);
    table.at(pos, cos.data(), sin.data());
    const std::vector<Expected> expected = expected_at(p, pos);
    for (size_t i = 0; i < half; ++i) {
      const double bound =
          4.5 * kUnit * std::fabs(expected[i].magnitude) + static_cast<double>(pos) * 0x1p-50;
      ASSERT_NEAR(cos[i], expected[i].magnitude * std::cos(expected[i].angle), bound) << pos << " " << i;
      ASSERT_NEAR(sin[i], expected[i].magnitude * std::sin(expected[i].angle), bound) << pos << " " << i;
      ASSERT_NEAR(static_cast<double>(pos) * table.frequency()[i], expected[i].angle,
                  static_cast<double>(pos) * 0x1p-50);
    }
    ASSERT_NEAR(table.magnitude(), expected[0].magnitude, kUnit * 2);
  }
}

TEST(RopeTable, Plain) {
  check({.n_rot = 64, .freq_base = 10000}, 8192);
  check({.n_rot = 128, .freq_base = 1e6}, 131072);
  check({.n_rot = 20, .freq_base = 500000}, 1 << 20);
  check({.n_rot = 2}, 300);
}

TEST(RopeTable, ShortContexts) {
  for (const int64_t n_ctx : {1, 2, 255, 256, 257}) check({.n_rot = 64}, n_ctx);
}

TEST(RopeTable, LinearScaling) { check({.n_rot = 64, .freq_scale = 0.25, .attn_factor = 1.5}, 32768); }

TEST(RopeTable, FrequencyFactors) {
  RopeParams p{.n_rot = 64, .freq_base = 500000};
  for (int i = 0; i < 32; ++i) p.freq_factors.push_back(1 + static_cast<float>(i) / 4);  // Llama 3: 1 .. 8
  check(p, 131072);
}

TEST(RopeTable, Yarn) {
  for (const double ext_factor : {1.0, 0.5}) {
    check({.n_rot = 128, .freq_base = 1e6, .freq_scale = 0.25, .ext_factor = ext_factor, .n_ctx_orig = 32768},
          131072);
    check({.n_rot = 64,
           .freq_base = 10000,
           .freq_scale = 1.0 / 40,
           .ext_factor = ext_factor,
           .attn_factor = 0.7,
           .beta_fast = 16,
           .beta_slow = 2,
           .n_ctx_orig = 4096},
          163840);
  }
}

// Qwen2.5 with factor 4: 128 ln(32768 / (32 * 2 pi)) / (2 ln 1e6) = 23.6 -> 23; with 1 turn 39.7 -> 40. So
// pairs up to 23 keep their frequency, pairs from 40 on have a quarter, pair 30 is 7/17 of the way. Magnitude
// 1 + 0.1 ln 4.
TEST(RopeTable, YarnByHand) {
  const RopeTable table(
      {.n_rot = 128, .freq_base = 1e6, .freq_scale = 0.25, .ext_factor = 1, .n_ctx_orig = 32768}, 1000);
  const auto plain = [](int i) { return std::pow(1e6, -i / 64.0); };
  for (int i = 0; i <= 23; ++i) EXPECT_NEAR(table.frequency()[static_cast<size_t>(i)] / plain(i), 1, 1e-12);
  for (int i = 40; i < 64; ++i)
    EXPECT_NEAR(table.frequency()[static_cast<size_t>(i)] / plain(i), 0.25, 1e-12);
  EXPECT_NEAR(table.frequency()[30] / plain(30), 0.25 * 7 / 17 + 10.0 / 17, 1e-12);
  EXPECT_NEAR(table.magnitude(), 1.1386294, 1e-6);
}

TEST(RopeTable, StrideBetweenPairs) {
  const RopeTable table({.n_rot = 16}, 1000);
  std::vector<float> cos(8);
  std::vector<float> sin(8);
  std::vector<float> cos_wide(8 * 3, 5);
  std::vector<float> sin_wide(8 * 3, 5);
  table.at(777, cos.data(), sin.data());
  table.at(777, cos_wide.data(), sin_wide.data(), 3);
  for (size_t i = 0; i < 24; ++i) {
    EXPECT_EQ(cos_wide[i], i % 3 == 0 ? cos[i / 3] : 5);
    EXPECT_EQ(sin_wide[i], i % 3 == 0 ? sin[i / 3] : 5);
  }
}

}  // namespace
}  // namespace narrows::kernels
