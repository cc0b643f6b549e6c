// The half-precision kernels on every target against their oracle, which follows the same roundings, and
// against another implementation (golden/make_pasa.py); and what they are there to show: fp16 overflows, pasa
// and fp16-shift do not.
#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "kernels/pasa.h"
#include "kernels/prefill_case.h"
#include "kernels/ref/ref.h"
#include "kernels/softmax_state.h"
#include "support/sanitized.h"

namespace narrows::kernels {
namespace {

constexpr PrefillKind kHalves[] = {PrefillKind::fp16, PrefillKind::pasa, PrefillKind::fp16_shift};

const PrefillKernel& kernel_of(const Ops& ops, PrefillKind kind) {
  return *ops.prefill[static_cast<int>(kind)];
}

const PrefillKernel& exact_kernel() { return ref::kPrefillF32; }

/// What rounds as the kernels of this table do.
const PrefillKernel& oracle_of(const Ops& ops, PrefillKind kind) {
  if (!ops.native_half) return kernel_of(ref::kTable, kind);
  if (kind == PrefillKind::fp16) return ref::kPrefillFp16Native;
  return kind == PrefillKind::pasa ? ref::kPrefillPasaNative : ref::kPrefillFp16ShiftNative;
}

/// Units in the last place of half at this size.
double half_ulp(double size) { return std::ldexp(1.0, std::max(std::ilogb(size), -14) - 10); }

double largest(const Array<float>& x) {
  double top = 0;
  for (int64_t i = 0; i < x.size(); ++i) {
    if (std::isfinite(x[i])) top = std::max(top, std::fabs(double{x[i]}));
  }
  return top;
}

/// Sums inside a chunk are float32 here and double in the oracle, which now and then turns a rounding the
/// other way: an ulp of the outputs. pasa multiplies what it does to a row mean by its recovery, 15.
double ulps(PrefillKind kind) { return kind == PrefillKind::pasa ? 16 : 2; }

class PrefillHalf : public EachTarget {
 protected:
  void check(const PrefillCase& c) {
    Random random(static_cast<uint32_t>(c.n_row + 131 * c.first + 31 * c.window + c.head_dim));
    const PrefillInputs in = make_inputs(c, random);
    const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
    for (const PrefillKind kind : kHalves) {
      const Array<float> got = attend(kernel_of(ops(), kind), c, in, scale);
      const Array<float> expected = attend(oracle_of(ops(), kind), c, in, scale);
      const double bound = ulps(kind) * half_ulp(largest(in.v));
      for (int64_t i = 0; i < got.size(); ++i) {
        ASSERT_EQ(std::isnan(got[i]), std::isnan(expected[i])) << i;
        if (!std::isnan(got[i])) {
          ASSERT_NEAR(got[i], expected[i], bound) << "kind " << static_cast<int>(kind) << ", row "
                                                  << i / in.ld << " of " << c.n_row << ", first " << c.first;
        }
      }
    }
  }
};

TEST_P(PrefillHalf, ShapesAgreeWithTheOracle) {
  for (const int64_t head_dim : {1, 8, 15, 16, 17, 64, 100, 128})
    check({.n_row = 40, .head_dim = head_dim, .first = 101, .gap = 3});
  for (const int64_t n_row : thinned<int64_t>({1, 31, 33, 130})) {
    for (const int64_t first : {0, 1, 127, 128, 300}) check({.n_row = n_row, .head_dim = 16, .first = first});
  }
  check({.n_row = 20, .head_dim = 64, .first = 2000});
  check({.n_row = 60, .head_dim = 64, .first = 500, .common = 5});
}

TEST_P(PrefillHalf, WindowsAndPartsAgreeWithTheOracle) {
  for (const int64_t window : thinned<int64_t>({1, 5, 64, 129, 400})) {
    for (const int64_t first : {0, 37, 300})
      check({.n_row = 70, .head_dim = 16, .first = first, .window = window});
  }
  for (const int64_t begin : thinned<int64_t>({0, 7, 128, 190})) {
    check({.n_row = 40, .head_dim = 24, .first = 333, .begin = begin, .end = 333});
    check({.n_row = 140, .head_dim = 24, .first = 100, .begin = begin, .end = 230});
  }
}

TEST_P(PrefillHalf, SkippedTilesAndStepsAgreeWithTheOracle) {
  const std::vector<uint8_t> some = {1, 0, 1, 1, 0};
  check({.n_row = 140, .head_dim = 16, .first = 400, .skip = some});
  check({.n_row = 33, .head_dim = 16, .first = 60, .window = 200, .end = 540, .step = 16, .skip = some});
  check({.n_row = 20, .head_dim = 24, .first = 500, .skip = {1, 1, 1, 1, 1}});
}

/// As golden/make_pasa.py draws them.
void draw(Array<float>& x, uint32_t seed, float mean, float amplitude) {
  for (int64_t i = 0; i < x.size(); ++i) {
    seed = 1664525U * seed + 1013904223U;
    x[i] = round_to_half(mean + amplitude * (static_cast<float>(seed >> 8) / 0x1p23F - 1));
  }
}

TEST_P(PrefillHalf, PasaIsWhatAnotherImplementationGives) {
  if (ops().native_half) GTEST_SKIP() << "the other implementation sums as a matrix unit does";
  std::ifstream golden(NARROWS_GOLDEN_DIR "/pasa.txt");
  int64_t head_dim = 0, n = 0, rows = 0;
  float mean = 0, amplitude = 0;
  int cases = 0;
  while (golden >> head_dim >> n >> rows >> mean >> amplitude) {
    ++cases;
    const PrefillCase c{.n_row = rows, .head_dim = head_dim, .first = n - rows};
    PrefillInputs in{head_dim, Array<float>(rows * head_dim), Array<float>(n * head_dim),
                     Array<float>(n * head_dim)};
    draw(in.q, 1, mean, amplitude);
    draw(in.k, 2, mean, amplitude);
    draw(in.v, 3, mean, amplitude);
    const Array<float> out =
        attend(kernel_of(ops(), PrefillKind::pasa), c, in, 1 / std::sqrt(static_cast<float>(head_dim)));
    for (int64_t i = 0; i < out.size(); ++i) {
      double expected = 0;
      ASSERT_TRUE(golden >> expected);
      ASSERT_NEAR(out[i], expected, 3 * half_ulp(largest(in.v))) << "case " << cases << ", number " << i;
    }
  }
  EXPECT_EQ(cases, 4);
}

// What docs/half_precision.md says of half arithmetic: relative RMSE against exact attention, to be read with
// --gtest_output=xml. fp16-shift may cost no more than three times a matrix unit's.
TEST_P(PrefillHalf, ErrorsBesideThoseOfAMatrixUnit) {
  constexpr const char* kNames[] = {"fp16", "pasa", "fp16-shift"};
  struct Numbers {
    float mean, amplitude;
  };
  for (const Numbers n : {Numbers{0, 0.5F}, Numbers{10, 0.5F}, Numbers{20, 0.5F}, Numbers{10, 5}}) {
    const PrefillCase c{.n_row = 32, .head_dim = 64, .first = 608};
    PrefillInputs in{c.head_dim, Array<float>(c.n_row * c.head_dim), Array<float>(c.n_key() * c.head_dim),
                     Array<float>(c.n_key() * c.head_dim)};
    draw(in.q, 1, n.mean, n.amplitude);
    draw(in.k, 2, n.mean, n.amplitude);
    draw(in.v, 3, n.mean, n.amplitude);
    const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
    const Array<float> exact = attend(exact_kernel(), c, in, scale);
    const auto rmse = [&](const PrefillKernel& kernel) {
      const Array<float> out = attend(kernel, c, in, scale);
      double square = 0, size = 0;
      for (int64_t i = 0; i < out.size(); ++i) square += std::pow(double{out[i]} - double{exact[i]}, 2);
      for (int64_t i = 0; i < in.v.size(); ++i) size += double{in.v[i]} * double{in.v[i]};
      return std::sqrt(square / static_cast<double>(out.size()) / (size / static_cast<double>(in.v.size())));
    };
    for (const PrefillKind kind : kHalves) {
      const double here = rmse(kernel_of(ops(), kind));
      RecordProperty(std::string(kNames[static_cast<int>(kind) - static_cast<int>(PrefillKind::fp16)]) +
                         "_mean_" + std::to_string(static_cast<int>(n.mean)) + "_amplitude_" +
                         std::to_string(n.amplitude).substr(0, 3),
                     std::to_string(here * 1e6) + "e-6");
      if (kind == PrefillKind::fp16_shift) {
        EXPECT_LT(here, 3 * rmse(kernel_of(ref::kTable, kind)) + 1e-6);
      }
    }
  }
}

TEST(PasaMatrix, RecoveryUndoesTheShiftThatTheRoundedMatrixApplies) {
  for (const float head_dim : {16.0F, 64.0F, 80.0F, 96.0F, 100.0F, 128.0F, 256.0F}) {
    const float scale = 1 / std::sqrt(head_dim);
    const PasaMatrix m = pasa_matrix(scale);
    const double on = m.diagonal, off = m.rest, n = kPrefillTile;
    // M of a constant key: what is left of its scores.
    const double left = on + (n - 1) * off;
    // The rest of a score moves by (1 - left / (on - off)) of itself; the recovery gives that back.
    EXPECT_NEAR(m.recovery * left, on - off - left, 2 * half_ulp(m.recovery) * std::fabs(left)) << head_dim;
    EXPECT_NEAR(on - off, scale, scale * 0x1p-9) << head_dim;
    EXPECT_NEAR(m.recovery, 15, 0.1) << head_dim;
  }
}

// Numbers around 30 in all coordinates: q.k is about 115,200 at head_dim 128, beyond half's 65,504.
TEST_P(PrefillHalf, OnlyPlainHalfOverflows) {
  const PrefillCase c{.n_row = 40, .head_dim = 128, .first = 360, .common = 30};
  Random random(1);
  PrefillInputs in = make_inputs(c, random);
  const float scale = 1 / std::sqrt(128.0F);
  const Array<float> exact = attend(exact_kernel(), c, in, scale);
  for (const PrefillKind kind : kHalves) {
    const Array<float> out = attend(kernel_of(ops(), kind), c, in, scale);
    int64_t bad = 0;
    double square = 0, size = 0;
    for (int64_t i = 0; i < out.size(); ++i) {
      bad += !std::isfinite(out[i]);
      square += std::pow(double{out[i]} - double{exact[i]}, 2);
      size += double{in.v[i]} * double{in.v[i]};
    }
    if (kind == PrefillKind::fp16) {
      EXPECT_EQ(bad, out.size());
      continue;
    }
    EXPECT_EQ(bad, 0);
    // Random scores as spread out as these (sigma 30) make the softmax a maximum: a coarse row mean can pick
    // another key. The exact shift does not care.
    EXPECT_LT(std::sqrt(square / size), kind == PrefillKind::pasa ? 0.7 : 0.02);
  }
}

TEST_P(PrefillHalf, StatesOfPartsMergeToTheWhole) {
  const PrefillCase c{.n_row = 50, .head_dim = 32, .first = 400, .common = 1};
  Random random(5);
  const PrefillInputs in = make_inputs(c, random);
  const Array<float> exact = attend(exact_kernel(), c, in, 0.2F);
  for (const PrefillKind kind : kHalves) {
    const PrefillKernel& kernel = kernel_of(ops(), kind);
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
    for (int64_t i = 0; i < exact.size(); ++i)
      ASSERT_NEAR(into.out[i], exact[i], 0.05) << static_cast<int>(kind);
  }
}

NARROWS_EACH_TARGET(PrefillHalf);

}  // namespace
}  // namespace narrows::kernels
