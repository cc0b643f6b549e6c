// PrefillKernel::look() on every target: which part of a row's softmax falls on which tile, against a softmax
// in double of the numbers that went in.
#include <cmath>
#include <vector>

#include "kernels/prefill_case.h"

namespace narrows::kernels {
namespace {

constexpr PrefillKind kLookers[] = {PrefillKind::f32, PrefillKind::bf16, PrefillKind::bf16_shift};

class PrefillLook : public EachTarget {
 protected:
  void check(PrefillKind kind, const PrefillCase& c, const PrefillInputs& in);
  void check_all(const PrefillCase& c) {
    Random random(static_cast<uint32_t>(c.n_row + 131 * c.first + 31 * c.window + c.head_dim));
    const PrefillInputs in = make_inputs(c, random);
    for (const PrefillKind kind : kLookers) {
      SCOPED_TRACE(::testing::Message() << "kind " << static_cast<int>(kind));
      check(kind, c, in);
    }
  }
  const PrefillKernel& kernel(PrefillKind kind) const { return *ops().prefill[static_cast<int>(kind)]; }
  /// share [tiles, kLookRows]; NaN where look() wrote nothing.
  Array<float> look(PrefillKind kind, const PrefillCase& c, const PrefillInputs& in) const {
    const std::vector<std::byte> tiles = pack(kernel(kind), c, in, kScale);
    Array<float> share((c.n_key() + kPrefillTile - 1) / kPrefillTile * kLookRows), no_out(0);
    Scratch scratch(kernel(kind).scratch_bytes(c.head_dim));
    kernel(kind).look(rows_of(c, in, tiles, kScale, no_out, scratch), share.data());
    return share;
  }
  static constexpr float kScale = 0.25F;
};

void PrefillLook::check(PrefillKind kind, const PrefillCase& c, const PrefillInputs& in) {
  const Array<float> share = look(kind, c, in);
  const int64_t n_tile = share.size() / kLookRows;
  for (int64_t r = 0; r < c.n_row; ++r) {
    std::vector<double> score, expected(static_cast<size_t>(n_tile));
    double top = -1e300, size = 0, total = 0;
    for (int64_t j = c.seen_begin(r); j < c.seen_end(r); ++j) {
      double sum = 0, absolute = 0;
      for (int64_t d = 0; d < c.head_dim; ++d) {
        const double x = double{in.q[r * in.ld + d]} * double{in.k[j * in.ld + d]} * double{kScale};
        sum += x;
        absolute += std::fabs(x);
      }
      score.push_back(sum);
      top = std::max(top, sum);
      size = std::max(size, absolute);
    }
    for (size_t i = 0; i < score.size(); ++i) {
      const double w = std::exp(score[i] - top);
      expected[static_cast<size_t>((c.seen_begin(r) + static_cast<int64_t>(i)) / kPrefillTile)] += w;
      total += w;
    }
    // Two rounded operands of a score, one rounded weight; keys less a mean are not larger than twice the
    // keys.
    const double unit = kind == PrefillKind::f32 ? 0 : 0x1p-9;
    const double error = 2 * (std::exp(4 * unit * size + gamma(64.0) * size) * (1 + unit) * (1 + 1e-4) - 1);
    for (int64_t t = 0; t < n_tile; ++t) {
      const double x = total > 0 ? expected[static_cast<size_t>(t)] / total : 0;
      ASSERT_NEAR(share[t * kLookRows + r], x, error * x + 1e-30) << "row " << r << ", tile " << t;
    }
  }
}

TEST_P(PrefillLook, RowsAndSteps) {
  for (const int64_t n_row : {1, 2, 7, 8, 9, 16, 17, 31, 32}) {
    for (const int64_t first : {0, 5, 127, 128, 700}) {
      for (const int64_t step : {1, 16})
        check_all({.n_row = n_row, .head_dim = 16, .first = first, .step = step});
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(PrefillLook, HeadDimsWindowsAndParts) {
  for (const int64_t head_dim : {1, 15, 64, 100})
    check_all({.n_row = 20, .head_dim = head_dim, .first = 300, .gap = 3});
  for (const int64_t window : {1, 100, 128, 1000})
    check_all({.n_row = 32, .head_dim = 16, .first = 300, .window = window, .step = 16});
  for (const int64_t begin : {7, 128, 200})
    check_all({.n_row = 9, .head_dim = 16, .first = 100, .begin = begin, .end = 333, .step = 9});
}

// References that go stale again and again: sums of earlier tiles follow.
TEST_P(PrefillLook, ScoresThatRunAway) {
  for (const float slope : {2.0F, -2.0F, 0.02F}) {
    const PrefillCase c{.n_row = 30, .head_dim = 8, .first = 600, .step = 4};
    Random random(3);
    PrefillInputs in = make_inputs(c, random);
    for (int64_t j = 0; j < c.n_key(); ++j) in.k[j * 8] = slope * static_cast<float>(j);
    for (int64_t r = 0; r < c.n_row; ++r) in.q[r * 8] = r % 3 == 0 ? -1.0F : 1.0F;
    check(PrefillKind::f32, c, in);
  }
}

TEST_P(PrefillLook, NonFiniteInputsStayInTheirRow) {
  for (const float bad : {kNaN, kInf}) {
    const PrefillCase c{.n_row = 30, .head_dim = 16, .first = 500};
    Random random(2);
    PrefillInputs in = make_inputs(c, random);
    in.q[20 * 16 + 3] = bad;
    for (const PrefillKind kind : kLookers) {
      const Array<float> share = look(kind, c, in);
      bool found = false;
      for (int64_t t = 0; t < share.size() / kLookRows; ++t) {
        found = found || !std::isfinite(share[t * kLookRows + 20]);
        EXPECT_TRUE(std::isfinite(share[t * kLookRows + 19])) << t;
      }
      EXPECT_TRUE(found);
    }
  }
}

// Half precision has no statistics that would do: callers ask first.
TEST_P(PrefillLook, HalfKernelsCannot) {
  for (const PrefillKind kind : {PrefillKind::fp16, PrefillKind::pasa, PrefillKind::fp16_shift})
    EXPECT_EQ(kernel(kind).look, nullptr);
}

NARROWS_EACH_TARGET(PrefillLook);

}  // namespace
}  // namespace narrows::kernels
