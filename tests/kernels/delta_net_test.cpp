// Kernels of gated DeltaNet on every target: against the oracle in double at odd sizes; tiles of tokens
// against the same tokens one by one; what an algorithm by hand gives.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/kernel_test.h"

namespace narrows::kernels {
namespace {

class DeltaNetKernels : public EachTarget {
 protected:
  static const Ops& oracle() { return *available_targets().back(); }
};

double difference(const Array<float>& a, const Array<float>& b) {
  double most = 0;
  for (int64_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i])) return kInf;
    if (!std::isnan(a[i])) most = std::max(most, std::fabs(double{a[i]} - double{b[i]}));
  }
  return most;
}

Array<float> copy_of(const Array<float>& x) {
  Array<float> y(x.size());
  std::copy_n(x.data(), x.size(), y.data());
  return y;
}

TEST_P(DeltaNetKernels, SigmoidGate) {
  Random random(1);
  for (int64_t n = 0; n < 70; ++n) {
    Array<float> gate(n), y(n);
    fill_normal(gate, 1, n, n, random, 8);
    fill_normal(y, 1, n, n, random);
    Array<float> want = copy_of(y);
    ops().sigmoid_gate(gate.data(), n, y.data());
    oracle().sigmoid_gate(gate.data(), n, want.data());
    for (int64_t i = 0; i < n; ++i)
      ASSERT_LE(std::fabs(double{y[i]} - double{want[i]}), 0x1p-21 * std::fabs(double{want[i]}) + 1e-37);
  }
  Array<float> gate(4), y(4);
  const float far[] = {-200, 200, kInf, 0};
  std::copy_n(far, 4, gate.data());
  std::fill_n(y.data(), 4, 3.0F);
  ops().sigmoid_gate(gate.data(), 4, y.data());
  const float want[] = {0, 3, 3, 1.5F};
  for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(y[i], want[i]);
}

TEST_P(DeltaNetKernels, L2Norm) {
  Random random(2);
  for (int64_t n = 1; n < 140; ++n) {
    Array<float> x(n), y(n), want(n);
    fill_normal(x, 1, n, n, random, n % 3 == 0 ? 1e-4F : 2);
    ops().l2_norm(x.data(), n, 1e-6F, 0.25F, y.data());
    oracle().l2_norm(x.data(), n, 1e-6F, 0.25F, want.data());
    for (int64_t i = 0; i < n; ++i)
      ASSERT_LE(std::fabs(double{y[i]} - double{want[i]}),
                gamma(static_cast<double>(n) + 4) * std::fabs(double{want[i]}));
    ops().l2_norm(x.data(), n, 1e-6F, 0.25F, x.data());  // in place
    EXPECT_EQ(difference(x, y), 0);
  }
  Array<float> zero(5);
  std::fill_n(zero.data(), 5, 0.0F);
  ops().l2_norm(zero.data(), 5, 1e-6F, 1, zero.data());
  for (int64_t i = 0; i < 5; ++i) EXPECT_EQ(zero[i], 0);
}

TEST_P(DeltaNetKernels, ConvolutionReadsRowsBefore) {
  Random random(3);
  for (const int64_t n_conv : {1, 2, 4, 7}) {
    for (const int64_t n : {0, 1, 2, 3, 5, 9}) {
      for (const int64_t channels : {1, 5, 16, 37}) {
        const int64_t ldx = channels + 3, ldb = channels + 1, ldw = channels + 2, ldy = channels + 4;
        Array<float> x(n * ldx), before((n_conv - 1) * ldb), w(n_conv * ldw), y(n * ldy), want(n * ldy);
        fill_normal(x, n, channels, ldx, random);
        fill_normal(before, n_conv - 1, channels, ldb, random);
        fill_normal(w, n_conv, channels, ldw, random);
        for (const auto& [table, to] : {std::pair(&ops(), &y), std::pair(&oracle(), &want)})
          table->conv_silu(x.data(), ldx, before.data(), ldb, w.data(), ldw, n_conv, n, channels, to->data(),
                           ldy);
        EXPECT_LT(difference(y, want), 3e-6) << n_conv << " tokens, " << n << " rows of " << channels;
      }
    }
  }
}

// Rows in two pieces, the first one's last rows before the second, are the rows at once to the last bit.
TEST_P(DeltaNetKernels, ConvolutionGoesOn) {
  Random random(4);
  const int64_t n = 11, channels = 21, n_conv = 4;
  Array<float> x(n * channels), before(3 * channels), w(n_conv * channels), at_once(n * channels);
  fill_normal(x, n, channels, channels, random);
  fill_normal(before, 3, channels, channels, random);
  fill_normal(w, n_conv, channels, channels, random);
  const auto run = [&](int64_t first, int64_t rows, const float* rows_before, Array<float>& to) {
    ops().conv_silu(x.data() + first * channels, channels, rows_before, channels, w.data(), channels, n_conv,
                    rows, channels, to.data() + first * channels, channels);
  };
  run(0, n, before.data(), at_once);
  Array<float> pieces(n * channels);
  run(0, 6, before.data(), pieces);
  run(6, 5, x.data() + 3 * channels, pieces);
  EXPECT_EQ(difference(at_once, pieces), 0);
}

/// Rows of one head, normed as a layer's are.
struct Head {
  Head(int64_t rows, int64_t dim, Random& random, float mean_log_decay = -0.3F)
      : n(rows), d(dim), kq(2 * n * d), v(n * d), log_decay(n), beta(n), s(d * d) {
    fill_normal(kq, 2 * n, d, d, random);
    fill_normal(v, n, d, d, random);
    fill_normal(s, d, d, d, random, 0.3F);
    const Ops& op = *available_targets().back();
    for (int64_t r = 0; r < 2 * n; ++r) op.l2_norm(kq.data() + r * d, d, 1e-6F, 1, kq.data() + r * d);
    std::uniform_real_distribution<float> draw(0, 1);
    for (int64_t t = 0; t < n; ++t) {
      log_decay[t] = 2 * mean_log_decay * draw(random);
      beta[t] = draw(random);
    }
  }
  Head(const Head& h)
      : n(h.n),
        d(h.d),
        kq(copy_of(h.kq)),
        v(copy_of(h.v)),
        log_decay(copy_of(h.log_decay)),
        beta(copy_of(h.beta)),
        s(copy_of(h.s)) {}

  /// Outputs [n, d]; s becomes the state after them.
  Array<float> at_once(const Ops& op) {
    Array<float> out(n * d);
    Scratch work(delta_work_floats(d) * int64_t{sizeof(float)});
    op.delta_rows(kq.data(), v.data(), log_decay.data(), beta.data(), n, d, s.data(), out.data(), d,
                  work.floats());
    return out;
  }
  Array<float> one_by_one(const Ops& op) {
    Array<float> out(n * d);
    for (int64_t t = 0; t < n; ++t)
      op.delta_step(kq.data() + (n + t) * d, kq.data() + t * d, v.data() + t * d, std::exp(log_decay[t]),
                    beta[t], d, s.data(), out.data() + t * d);
    return out;
  }

  int64_t n, d;
  Array<float> kq, v, log_decay, beta, s;
};

// Numbers are of the order of 1; measured 2e-7 to 2e-6.
constexpr double kTolerance = 1e-5;

TEST_P(DeltaNetKernels, OneToken) {
  Random random(5);
  for (const int64_t d : {1, 3, 8, 16, 31, 64, 100, 128}) {
    Head head(1, d, random), same(head);
    EXPECT_LT(difference(head.one_by_one(ops()), same.one_by_one(oracle())), kTolerance) << d;
    EXPECT_LT(difference(head.s, same.s), kTolerance) << d;
  }
}

TEST_P(DeltaNetKernels, ManyTokensAreTheOraclesOneByOne) {
  Random random(6);
  for (const int64_t d : {1, 5, 16, 33, 64, 128}) {
    for (const int64_t n : {0, 1, 2, 5, 6, 7, 13, 31, 63, 64}) {
      Head head(n, d, random), same(head), steps(head);
      const Array<float> want = same.at_once(oracle());
      EXPECT_LT(difference(head.at_once(ops()), want), kTolerance) << n << " tokens of " << d;
      EXPECT_LT(difference(head.s, same.s), kTolerance) << n << " tokens of " << d;
      EXPECT_LT(difference(steps.one_by_one(ops()), want), kTolerance) << n << " tokens of " << d;
      EXPECT_LT(difference(steps.s, same.s), kTolerance) << n << " tokens of " << d;
    }
  }
}

// Keys that repeat make the system as far from the identity as it gets; states that are forgotten at once
// must not be divided by; states that are kept for ever must not grow.
TEST_P(DeltaNetKernels, ExtremesOfDecayAndKeys) {
  Random random(7);
  for (const float log_decay : {0.0F, -1e-4F, -30.0F, -1000.0F}) {
    for (const bool one_key : {false, true}) {
      Head head(64, 32, random, log_decay);
      for (int64_t t = 1; one_key && t < head.n; ++t)
        std::copy_n(head.kq.data(), 32, head.kq.data() + t * 32);
      for (int64_t t = 0; one_key && t < head.n; ++t) head.beta[t] = 1;
      Head same(head);
      EXPECT_LT(difference(head.at_once(ops()), same.at_once(oracle())), kTolerance) << log_decay;
      EXPECT_LT(difference(head.s, same.s), kTolerance) << log_decay;
    }
  }
}

// By hand: a key of length 1 that is stored with beta 1 gives its value back, and in its place a later one.
TEST_P(DeltaNetKernels, WhatAKeyStoresItGivesBack) {
  const float k[] = {0.6F, 0.8F}, first[] = {3, -5}, second[] = {1, 2};
  float s[4] = {}, out[2];
  ops().delta_step(k, k, first, 1, 1, 2, s, out);
  EXPECT_NEAR(out[0], 3, 1e-6);
  EXPECT_NEAR(out[1], -5, 1e-6);
  ops().delta_step(k, k, second, 0.5F, 1, 2, s, out);
  EXPECT_NEAR(out[0], 1, 1e-6);
  EXPECT_NEAR(out[1], 2, 1e-6);
  const float other[] = {-0.8F, 0.6F};
  ops().delta_step(other, k, second, 1, 0, 2, s, out);
  EXPECT_NEAR(out[0], 0, 1e-6);
}

// A NaN is not lost (and may be in other rows of its tile too).
TEST_P(DeltaNetKernels, NotANumberStays) {
  Random random(8);
  Head head(9, 16, random);
  head.v[4 * 16 + 3] = kNaN;
  const Array<float> out = head.at_once(ops());
  EXPECT_TRUE(std::isnan(out[4 * 16 + 3]));
  EXPECT_TRUE(std::isnan(head.s[3]));
}

NARROWS_EACH_TARGET(DeltaNetKernels);

}  // namespace
}  // namespace narrows::kernels
