// Every prefill kernel on every target against a two-pass softmax in double of the numbers that went in:
// positions around tile and block edges, windows, parts of the keys, strides, magnitudes. Bounds follow from
// the unit roundoff of the format; gaps between rows are NaN.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/pasa.h"
#include "kernels/prefill_case.h"
#include "kernels/softmax_state.h"
#include "support/sanitized.h"

namespace narrows::kernels {
namespace {

using Case = PrefillCase;
using Inputs = PrefillInputs;

/// How far a kernel may be from exact arithmetic on the same float inputs.
struct Format {
  double unit;      ///< of operands and weights
  double exponent;  ///< relative error of a weight's power of two
  bool shift;
  double accumulator = 0;  ///< unit of sums of products; 0: float32
  double value_sums = 0;   ///< roundings to that unit, of a sum over a tile
  double score_sums = 0;   ///< of a score's
};

Format format_of(const Ops& ops, PrefillKind kind) {
  switch (kind) {
    case PrefillKind::bf16:
      return {0x1p-9, 9e-5, false};
    case PrefillKind::bf16_shift:
      return {0x1p-9, 9e-5, true};
    case PrefillKind::fp16_shift:
      if (ops.native_half) return {0x1p-11, 0x1p-21, true, 0x1p-11, kNativeValues, kNativeScores};
      return {0x1p-11, 0x1p-21, true, 0x1p-11, static_cast<double>(kPrefillTile / kHalfChunk)};
    default:
      return {0, 0x1p-21, false};
  }
}

/// fp16 and pasa have no useful bound: prefill_half_test.cpp compares them with their oracle.
constexpr PrefillKind kBounded[] = {PrefillKind::f32, PrefillKind::bf16, PrefillKind::bf16_shift,
                                    PrefillKind::fp16_shift};

class Prefill : public EachTarget {
 protected:
  void check(PrefillKind kind, const Case& c);
  void check_all(const Case& c) {
    for (const PrefillKind kind : kBounded) {
      SCOPED_TRACE(::testing::Message() << "kind " << static_cast<int>(kind));
      check(kind, c);
      if (HasFatalFailure()) return;
    }
  }
};

/// Mean key of each tile, as a kernel with a shift takes it away; zeros without.
std::vector<std::vector<double>> tile_means(const Case& c, const Inputs& in, bool shift) {
  std::vector<std::vector<double>> means;
  for (int64_t at = 0; at < c.n_key(); at += kPrefillTile) {
    const int64_t n = std::min(kPrefillTile, c.n_key() - at);
    std::vector<double> mean(static_cast<size_t>(c.head_dim));
    for (int64_t j = at; j < at + n && shift; ++j) {
      for (int64_t d = 0; d < c.head_dim; ++d)
        mean[static_cast<size_t>(d)] += double{in.k[j * in.ld + d]} / static_cast<double>(n);
    }
    means.push_back(mean);
  }
  return means;
}

void check_row(const Case& c, const Inputs& in, const Format& format, float scale, int64_t r,
               const std::vector<std::vector<double>>& means, const float* out) {
  std::vector<int64_t> keys;
  for (int64_t j = c.seen_begin(r); j < c.seen_end(r); ++j) {
    if (!c.skips(j)) keys.push_back(j);
  }
  std::vector<double> score;
  double rounded = 0;  // what products of rounded numbers sum up, the largest of a key
  double carried = 0;  // what float sums pass through besides
  double small = 0;    // what halves below 2^-14 are off by does not shrink with them
  for (const int64_t j : keys) {
    double sum = 0, size = 0, offset = 0, operands = 0;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      const double q = double{in.q[r * in.ld + d]} * double{scale}, k = in.k[j * in.ld + d];
      const double mean = means[static_cast<size_t>(j / kPrefillTile)][static_cast<size_t>(d)];
      sum += q * k;
      size += std::fabs(q * (k - mean));
      operands += std::fabs(double{in.q[r * in.ld + d]}) + std::fabs(k - mean);
      // Against the mean of whichever tile the kernel takes as its base.
      double away = 0;
      for (const auto& base : means) away = std::max(away, std::fabs(mean - base[static_cast<size_t>(d)]));
      offset += std::fabs(q) * away;
    }
    score.push_back(sum);
    rounded = std::max(rounded, size);
    carried = std::max(carried, offset);
    small = std::max(small, format.score_sums > 0 ? 0x1p-24 * operands : 0);
  }
  if (score.empty()) {
    for (int64_t d = 0; d < c.head_dim; ++d) ASSERT_EQ(out[d], 0) << "row " << r;
    return;
  }
  const double top = *std::max_element(score.begin(), score.end());
  const double bottom = *std::min_element(score.begin(), score.end());
  // A sum begins with the offset less the reference, which lies between the scores.
  const double slack =
      (2 * format.unit + format.unit * format.unit + format.score_sums * format.accumulator) * rounded +
      small + gamma(static_cast<double>(c.head_dim) + 8) * (2 * rounded + 2 * carried + (top - bottom));
  // A weight is off by this factor, up or down; so is the sum of weights. Values have one rounding more.
  const double weight_error = (1 + format.unit) * (1 + format.exponent) * std::exp(slack) - 1;
  const double error = 2 * weight_error + weight_error * weight_error + 2 * format.unit +
                       format.value_sums * format.accumulator +
                       gamma(2 * static_cast<double>(keys.size()) + 20);
  for (int64_t d = 0; d < c.head_dim; ++d) {
    double sum = 0, size = 0, total = 0, values = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      const int64_t j = keys[i];
      const double w = std::exp(score[i] - top);
      total += w;
      sum += w * double{in.v[j * in.ld + d]};
      size += w * std::fabs(double{in.v[j * in.ld + d]});
      values += std::fabs(double{in.v[j * in.ld + d]});
    }
    ASSERT_NEAR(out[d], sum / total,
                error * size / total + (format.accumulator > 0 ? 0x1p-24 * values / total : 1e-30))
        << "row " << r << " of " << c.n_row << ", coordinate " << d << " of " << c.head_dim << ", first "
        << c.first << ", window " << c.window << ", keys " << c.begin << " to " << c.n_key();
  }
}

void Prefill::check(PrefillKind kind, const Case& c) {
  const PrefillKernel& kernel = *ops().prefill[static_cast<int>(kind)];
  Random random(static_cast<uint32_t>(c.n_row + 131 * c.first + 31 * c.window + c.head_dim));
  const Inputs in = make_inputs(c, random);
  const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  const Array<float> out = attend(kernel, c, in, scale);
  const Format format = format_of(ops(), kind);
  const auto means = tile_means(c, in, format.shift);
  for (int64_t r = 0; r < c.n_row; ++r) {
    check_row(c, in, format, scale, r, means, out.data() + r * in.ld);
    if (HasFatalFailure()) return;
    for (int64_t d = c.head_dim; d < in.ld && r < c.n_row - 1; ++d)
      ASSERT_TRUE(std::isnan(out[r * in.ld + d]));
  }
}

TEST_P(Prefill, HeadDims) {
  for (const int64_t head_dim : thinned<int64_t>({1, 2, 7, 8, 32, 64, 80, 96, 100, 128, 256})) {
    for (const int64_t gap : thinned<int64_t>({0, 3})) {
      check_all({.n_row = 70, .head_dim = head_dim, .first = 65, .gap = gap});
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Prefill, RowsAroundTilesAndBlocks) {
  for (const int64_t n_row :
       thinned<int64_t>({1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 200, 300})) {
    for (const int64_t first : thinned<int64_t>({0, 1, 63, 127, 128, 200})) {
      check_all({.n_row = n_row, .head_dim = 16, .first = first});
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Prefill, Windows) {
  for (const int64_t window : thinned<int64_t>({1, 2, 5, 63, 64, 65, 127, 128, 129, 400, 100000})) {
    for (const int64_t n_row : thinned<int64_t>({1, 64, 150})) {
      for (const int64_t first : thinned<int64_t>({0, 37, 128, 300})) {
        check_all({.n_row = n_row, .head_dim = 16, .first = first, .window = window, .gap = 1});
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(Prefill, PartsOfTheKeysAndNoMask) {
  for (const int64_t begin : thinned<int64_t>({0, 1, 7, 128, 130, 190})) {
    for (const int64_t end : thinned<int64_t>({191, 200, 256, 333})) {
      check_all({.n_row = 40, .head_dim = 24, .first = end, .begin = begin, .end = end});   // no mask
      check_all({.n_row = 140, .head_dim = 24, .first = 100, .begin = begin, .end = end});  // causal
      check_all({.n_row = 60, .head_dim = 24, .first = 150, .window = 40, .begin = begin, .end = end});
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Prefill, SkippedTilesAndStepsBetweenRows) {
  const std::vector<uint8_t> some = {1, 0, 1, 1, 0}, none(5, 0), all(5, 1);
  for (const auto& skip : {some, none, all}) {
    check_all({.n_row = 140, .head_dim = 16, .first = 400, .end = 540, .skip = skip});
    check_all(
        {.n_row = 33, .head_dim = 16, .first = 60, .window = 200, .end = 540, .step = 16, .skip = skip});
    check_all({.n_row = 7, .head_dim = 24, .first = 540, .begin = 130, .end = 540, .skip = skip});
    if (HasFatalFailure()) return;
  }
}

TEST_P(Prefill, OneKey) {
  check_all({.n_row = 1, .head_dim = 64});
  check_all({.n_row = 33, .head_dim = 64, .first = 200, .window = 1});
}

TEST_P(Prefill, RowsThatSeeNoKeyAreZeroAndTheirStateIsEmpty) {
  const Case c{.n_row = 80, .head_dim = 16, .begin = 50};
  Random random(1);
  const Inputs in = make_inputs(c, random);
  for (const PrefillKernel* kernel : ops().prefill) {
    const std::vector<std::byte> tiles = pack(*kernel, c, in, 0.25F);
    Array<float> out(80 * 16), max(80), sum(80);
    Scratch scratch(kernel->scratch_bytes(16));
    PrefillRows rows = rows_of(c, in, tiles, 0.25F, out, scratch);
    kernel->attend(rows);
    for (int64_t i = 0; i < 50 * 16; ++i) ASSERT_EQ(out[i], 0);
    ASSERT_NE(out[50 * 16], 0);
    rows.max = max.data();
    rows.sum = sum.data();
    kernel->attend(rows);
    for (int64_t r = 0; r < 80; ++r) {
      ASSERT_EQ(max[r] == -kInf, r < 50) << r;
      ASSERT_EQ(sum[r] == 0, r < 50) << r;
    }
    for (int64_t i = 0; i < 50 * 16; ++i) ASSERT_EQ(out[i], 0);
  }
}

TEST_P(Prefill, SharpDistributions) {
  check(PrefillKind::f32, {.n_row = 100, .head_dim = 64, .first = 500, .sigma = 20});
  check(PrefillKind::f32, {.n_row = 100, .head_dim = 64, .first = 500, .sigma = 200});
  check(PrefillKind::bf16_shift, {.n_row = 100, .head_dim = 64, .first = 500, .sigma = 10});
}

// Scores that rise by thousands from tile to tile, or fall: references go stale again and again.
TEST_P(Prefill, ScoresThatRunAway) {
  for (const float slope : {10.0F, -10.0F, 0.3F}) {
    const Case c{.n_row = 140, .head_dim = 8, .first = 600};
    Random random(3);
    Inputs in = make_inputs(c, random);
    for (int64_t j = 0; j < c.n_key(); ++j) in.k[j * 8] = slope * static_cast<float>(j);
    for (int64_t r = 0; r < c.n_row; ++r) in.q[r * 8] = r % 3 == 0 ? -1.0F : 1.0F;
    const PrefillKernel& kernel = *ops().prefill[static_cast<int>(PrefillKind::f32)];
    const Array<float> out = attend(kernel, c, in, 0.5F);
    const auto means = tile_means(c, in, false);
    for (int64_t r = 0; r < c.n_row && !HasFatalFailure(); ++r)
      check_row(c, in, format_of(ops(), PrefillKind::f32), 0.5F, r, means, out.data() + r * 8);
  }
}

// Scores of 10^9 and more: float32 cannot tell them apart any more, but they are numbers and stay numbers.
TEST_P(Prefill, HugeScoresStayFinite) {
  const Case c{.n_row = 70, .head_dim = 16, .first = 300, .common = 20000};
  Random random(4);
  const Inputs in = make_inputs(c, random);
  for (const PrefillKind kind : {PrefillKind::f32, PrefillKind::bf16, PrefillKind::bf16_shift}) {
    const Array<float> out = attend(*ops().prefill[static_cast<int>(kind)], c, in, 1);
    for (int64_t i = 0; i < out.size(); ++i) ASSERT_LT(std::fabs(out[i]), 6) << static_cast<int>(kind);
  }
}

// The case of Qwen2: keys and queries far from zero, close to each other. With a shift the error is that of
// the small numbers; without, scores of 64 * 300 are off by tens.
TEST_P(Prefill, ShiftTakesACommonKeyAway) {
  const Case c{.n_row = 90, .head_dim = 64, .first = 700, .common = 17};
  check(PrefillKind::bf16_shift, c);
  Random random(static_cast<uint32_t>(c.n_row + 131 * c.first + c.head_dim));
  const Inputs in = make_inputs(c, random);
  double error[2] = {0, 0};
  for (const PrefillKind kind : {PrefillKind::bf16, PrefillKind::bf16_shift}) {
    const PrefillKernel& kernel = *ops().prefill[static_cast<int>(kind)];
    const PrefillKernel& exact = *available_targets().back()->prefill[0];
    const Array<float> out = attend(kernel, c, in, 0.125F), expected = attend(exact, c, in, 0.125F);
    for (int64_t i = 0; i < out.size(); ++i)
      error[kind == PrefillKind::bf16_shift] += std::pow(double{out[i]} - double{expected[i]}, 2);
  }
  EXPECT_LT(400 * error[1], error[0]) << "squares: 20 times closer";
}

TEST_P(Prefill, StatesOfPartsMergeToTheWhole) {
  for (const PrefillKind kind : kBounded) {
    const PrefillKernel& kernel = *ops().prefill[static_cast<int>(kind)];
    const Format format = format_of(ops(), kind);
    const Case c{.n_row = 50, .head_dim = 32, .first = 400, .common = 1};
    Random random(5);
    const Inputs in = make_inputs(c, random);
    const auto tiles = pack(kernel, c, in, 0.2F);
    Scratch scratch(kernel.scratch_bytes(32));
    Array<float> out[2] = {Array<float>(50 * 32), Array<float>(50 * 32)};
    Array<float> max[2] = {Array<float>(50), Array<float>(50)}, sum[2] = {Array<float>(50), Array<float>(50)};
    for (int part = 0; part < 2; ++part) {
      PrefillRows rows = rows_of(c, in, tiles, 0.2F, out[part], scratch);
      rows.begin = part == 0 ? 0 : 300;
      if (part == 0) rows.end = 300;
      rows.max = max[part].data();
      rows.sum = sum[part].data();
      kernel.attend(rows);
    }
    const SoftmaxRows into = {max[0].data(), sum[0].data(), out[0].data()};
    softmax_merge(into, {max[1].data(), sum[1].data(), out[1].data()}, 50, 32);
    softmax_normalise(into, 50, 32, into.out);
    const auto means = tile_means(c, in, format.shift);
    for (int64_t r = 0; r < 50; ++r) {
      check_row(c, in, format, 0.2F, r, means, into.out + r * 32);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Prefill, DeepContext) { check_all({.n_row = 20, .head_dim = 64, .first = 5000}); }

TEST_P(Prefill, NonFiniteInputsDoNotCrashAndAreNotHidden) {
  for (const PrefillKernel* kernel : ops().prefill) {
    for (const float bad : {kNaN, kInf}) {
      const Case c{.n_row = 70, .head_dim = 64, .first = 200};
      Random random(2);
      Inputs in = make_inputs(c, random);
      in.q[20 * 64 + 3] = bad;
      in.v[230 * 64 + 5] = bad;
      const Array<float> out = attend(*kernel, c, in, 0.125F);
      EXPECT_FALSE(std::isfinite(out[20 * 64]));
      EXPECT_TRUE(std::isfinite(out[19 * 64]));
      EXPECT_FALSE(std::isfinite(out[40 * 64 + 5]));
      EXPECT_TRUE(std::isfinite(out[40 * 64 + 6]));
    }
  }
}

NARROWS_EACH_TARGET(Prefill);

}  // namespace
}  // namespace narrows::kernels
