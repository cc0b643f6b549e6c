// prefill_attend on every target against a two-pass softmax in double: positions around tile and block edges,
// windows, strides; everything outside what a row may see is NaN.
#include <algorithm>
#include <vector>

#include "kernels/kernel_test.h"

namespace narrows::kernels {
namespace {

class PrefillAttend : public EachTarget {};

struct Case {
  int64_t n_row;
  int64_t head_dim;
  int64_t first;
  int64_t window;
  float sigma = 1;     ///< of the queries: 20 makes sharp distributions
  bool packed = true;  ///< v, q and out without gaps between rows
};

struct Inputs {
  int64_t ldq, ldv, ldo, ld_tile;
  Array<float> q, k_t, v;
};

/// Keys and values before every window and after the last row are NaN, and so are all gaps.
Inputs make_inputs(const Case& c, Random& random) {
  const int64_t n_kv = c.first + c.n_row;
  const int64_t n_tile = (n_kv + kTile - 1) / kTile;
  const int64_t gap = c.packed ? 0 : 3;
  const int64_t ld = c.head_dim + gap;
  const int64_t ld_tile = c.head_dim * kTile + gap;
  const int64_t begin = c.window > 0 ? std::max<int64_t>(0, c.first + 1 - c.window) : 0;
  Inputs in{ld,
            ld,
            ld,
            ld_tile,
            Array<float>((c.n_row - 1) * ld + c.head_dim),
            Array<float>((n_tile - 1) * ld_tile + c.head_dim * kTile),
            Array<float>((n_kv - 1) * ld + c.head_dim)};
  fill_normal(in.q, c.n_row, c.head_dim, ld, random, c.sigma);
  std::normal_distribution<float> normal;
  for (int64_t j = begin; j < n_kv; ++j) {
    for (int64_t d = 0; d < c.head_dim; ++d) {
      in.k_t[j / kTile * ld_tile + d * kTile + j % kTile] = normal(random);
      in.v[j * ld + d] = normal(random);
    }
  }
  return in;
}

/// The bound is that of attend_test.cpp, with one more rounding for the scaled query.
void check_row(const Case& c, const Inputs& in, float scale, int64_t r, const float* out) {
  const int64_t end = c.first + r + 1;
  const int64_t begin = c.window > 0 ? std::max<int64_t>(0, end - c.window) : 0;
  std::vector<double> score;
  double slack = 0;
  for (int64_t j = begin; j < end; ++j) {
    double sum = 0;
    double size = 0;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      const double term =
          double{in.q[r * in.ldq + d]} * double{in.k_t[j / kTile * in.ld_tile + d * kTile + j % kTile]};
      sum += term * double{scale};
      size += std::fabs(term * double{scale});
    }
    score.push_back(sum);
    slack = std::max(slack, gamma(static_cast<double>(c.head_dim) + 2) * size);
  }
  const double top = *std::max_element(score.begin(), score.end());
  const double bottom = *std::min_element(score.begin(), score.end());
  std::vector<double> expected(static_cast<size_t>(c.head_dim));
  double total = 0;
  double largest_v = 0;
  for (int64_t j = begin; j < end; ++j) {
    const double weight = std::exp(score[static_cast<size_t>(j - begin)] - top);
    total += weight;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      expected[static_cast<size_t>(d)] += weight * double{in.v[j * in.ldv + d]};
      largest_v = std::max(largest_v, std::fabs(double{in.v[j * in.ldv + d]}));
    }
  }
  const double n_tile = static_cast<double>(score.size()) / kTile + 2;
  const double e = 2 * slack + kUnit * (top - bottom + 1) + 0x1p-22 +
                   gamma(static_cast<double>(score.size()) + 3 * n_tile + 8);
  for (int64_t d = 0; d < c.head_dim; ++d) {
    ASSERT_NEAR(out[d], expected[static_cast<size_t>(d)] / total, 2 * e * largest_v)
        << "row " << r << " of " << c.n_row << " after " << c.first << ", coordinate " << d << " of "
        << c.head_dim << ", window " << c.window;
  }
}

void check(const Ops& ops, const Case& c) {
  Random random(static_cast<uint32_t>(c.n_row * 7919 + c.first * 31 + c.window + c.head_dim));
  const Inputs in = make_inputs(c, random);
  const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  Array<float> out((c.n_row - 1) * in.ldo + c.head_dim);
  Scratch scratch(4 * prefill_scratch_floats(c.n_row, c.head_dim));
  ops.prefill_attend(in.q.data(), in.ldq, c.n_row, c.head_dim, in.k_t.data(), in.ld_tile, in.v.data(), in.ldv,
                     c.first, c.window, scale, out.data(), in.ldo, scratch.floats());
  for (int64_t r = 0; r < c.n_row; ++r) {
    check_row(c, in, scale, r, out.data() + r * in.ldo);
    for (int64_t d = c.head_dim; d < in.ldo && r < c.n_row - 1; ++d)
      ASSERT_TRUE(std::isnan(out[r * in.ldo + d]));
  }
}

TEST_P(PrefillAttend, HeadDims) {
  for (const int64_t head_dim : {8, 32, 64, 80, 96, 100, 128}) {
    for (const bool packed : {true, false}) {
      check(ops(), {.n_row = 70, .head_dim = head_dim, .first = 65, .window = 0, .packed = packed});
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(PrefillAttend, RowsAroundTilesAndBlocks) {
  for (const int64_t n_row : {1, 2, 7, 63, 64, 65, 127, 128, 129, 200, 300}) {
    for (const int64_t first : {0, 1, 63, 64, 100}) {
      check(ops(), {.n_row = n_row, .head_dim = 16, .first = first, .window = 0});
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(PrefillAttend, Windows) {
  for (const int64_t window : {1, 2, 5, 63, 64, 65, 100, 128, 400, 100000}) {
    for (const int64_t n_row : {1, 64, 150}) {
      for (const int64_t first : {0, 37, 64, 300}) {
        check(ops(), {.n_row = n_row, .head_dim = 16, .first = first, .window = window, .packed = false});
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(PrefillAttend, SharpDistributions) {
  check(ops(), {.n_row = 100, .head_dim = 64, .first = 500, .window = 0, .sigma = 20});
  check(ops(), {.n_row = 100, .head_dim = 64, .first = 500, .window = 0, .sigma = 200});
}

TEST_P(PrefillAttend, DeepContext) {
  check(ops(), {.n_row = 20, .head_dim = 64, .first = 5000, .window = 0});
}

TEST_P(PrefillAttend, RowsOfMaskedKeysOnlyAreZero) {
  constexpr int64_t kDim = 16;
  Array<float> q(2 * kDim);
  Array<float> k_t(kDim * kTile);
  Array<float> v(2 * kDim);
  Array<float> out(2 * kDim);
  for (int64_t i = 0; i < 2 * kDim; ++i) q[i] = v[i] = 1;
  for (int64_t d = 0; d < kDim; ++d) {
    k_t[d * kTile] = -kInf;  // key 0: score -infinity
    k_t[d * kTile + 1] = 0;
  }
  Scratch scratch(4 * prefill_scratch_floats(2, kDim));
  ops().prefill_attend(q.data(), kDim, 2, kDim, k_t.data(), kDim * kTile, v.data(), kDim, 0, 0, 1, out.data(),
                       kDim, scratch.floats());
  for (int64_t d = 0; d < kDim; ++d) {
    EXPECT_EQ(out[d], 0);
    EXPECT_EQ(out[kDim + d], 1);
  }
}

TEST_P(PrefillAttend, NonFiniteInputsDoNotCrashAndAreNotHidden) {
  for (const float bad : {kNaN, kInf}) {
    const Case c{.n_row = 70, .head_dim = 64, .first = 10, .window = 0};
    Random random(2);
    Inputs in = make_inputs(c, random);
    in.q[20 * 64 + 3] = bad;
    in.v[30 * 64 + 5] = bad;
    Array<float> out(70 * 64);
    Scratch scratch(4 * prefill_scratch_floats(70, 64));
    ops().prefill_attend(in.q.data(), 64, 70, 64, in.k_t.data(), in.ld_tile, in.v.data(), 64, 10, 0, 0.125F,
                         out.data(), 64, scratch.floats());
    EXPECT_FALSE(std::isfinite(out[20 * 64]));
    EXPECT_FALSE(std::isfinite(out[40 * 64 + 5]));
    EXPECT_TRUE(std::isfinite(out[40 * 64 + 6]));
  }
}

NARROWS_EACH_TARGET(PrefillAttend);

}  // namespace
}  // namespace narrows::kernels
