// attend_f32, attend_f16 on every target: a sequence cut into tiles must give the softmax of the whole,
// computed in double; also the algebra of softmax_state.h, since decode merges states that these kernels
// made.
#include <algorithm>
#include <vector>

#include "kernels/kernel_test.h"
#include "kernels/softmax_state.h"
#include "support/sanitized.h"

namespace narrows::kernels {
namespace {

class Attend : public EachTarget {};

struct State {
  State(int64_t n_row, int64_t head_dim) : max(n_row), sum(n_row), out(n_row * head_dim) {
    softmax_clear(rows(), n_row, head_dim);
  }
  SoftmaxRows rows() { return {max.data(), sum.data(), out.data()}; }
  Array<float> max;
  Array<float> sum;
  Array<float> out;
};

/// Tiles of keys [head_dim, ldk] and values [n, ldv], exactly as long as their last element.
template <class T>
struct Tile {
  int64_t n;
  int64_t ldk;
  int64_t ldv;
  Array<T> k_t;
  Array<T> v;
};

template <class T>
Tile<T> make_tile(int64_t n, int64_t head_dim, Random& random) {
  const int64_t ldk = n + 3;
  const int64_t ldv = head_dim + 2;
  Array<float> k_t(n == 0 ? 0 : (head_dim - 1) * ldk + n);
  Array<float> v(n == 0 ? 0 : (n - 1) * ldv + head_dim);
  if (n > 0) {
    fill_normal(k_t, head_dim, n, ldk, random);
    fill_normal(v, n, head_dim, ldv, random);
  }
  if constexpr (std::is_same_v<T, float>) {
    return {n, ldk, ldv, std::move(k_t), std::move(v)};
  } else {
    return {n, ldk, ldv, to_halves(k_t), to_halves(v)};
  }
}

template <class T>
void run(const Ops& ops, const Array<float>& q, int64_t n_row, int64_t head_dim, const Tile<T>& tile,
         State& state) {
  if constexpr (std::is_same_v<T, float>) {
    ops.attend_f32(q.data(), n_row, head_dim, tile.k_t.data(), tile.ldk, tile.v.data(), tile.ldv, tile.n,
                   state.rows());
  } else {
    ops.attend_f16(q.data(), n_row, head_dim, tile.k_t.data(), tile.ldk, tile.v.data(), tile.ldv, tile.n,
                   state.rows());
  }
}

/// Compares out / sum and max + ln sum with the exact softmax over all tiles.
///
/// Bound: a score is off by at most ds = gamma(head_dim + 1) sum |q||k| (the larger of all keys); a weight
/// relative to the others by 2 ds, the rounding of its argument u |s - max|, and 2^-22 for exp; sums over n
/// keys add gamma(n); each tile may rescale once (2 more roundings). An average of values with weights off by
/// e moves by 2 e max |v|.
template <class T>
void expect_softmax(const Array<float>& q, int64_t n_row, int64_t head_dim, const std::vector<Tile<T>>& tiles,
                    State& state) {
  for (int64_t r = 0; r < n_row; ++r) {
    std::vector<double> score;
    std::vector<double> out(static_cast<size_t>(head_dim));
    double slack = 0;
    double largest_v = 0;
    for (const Tile<T>& tile : tiles) {
      for (int64_t j = 0; j < tile.n; ++j) {
        double sum = 0;
        double size = 0;
        for (int64_t d = 0; d < head_dim; ++d) {
          const double term = double{q[r * head_dim + d]} * as_double(tile.k_t[d * tile.ldk + j]);
          sum += term;
          size += std::fabs(term);
        }
        score.push_back(sum);
        slack = std::max(slack, gamma(static_cast<double>(head_dim) + 1) * size);
      }
    }
    if (score.empty()) {
      EXPECT_EQ(state.sum[r], 0);
      EXPECT_EQ(state.max[r], -kInf);
      continue;
    }
    const double top = *std::max_element(score.begin(), score.end());
    const double bottom = *std::min_element(score.begin(), score.end());
    double total = 0;
    size_t at = 0;
    for (const Tile<T>& tile : tiles) {
      for (int64_t j = 0; j < tile.n; ++j, ++at) {
        const double weight = std::exp(score[at] - top);
        total += weight;
        for (int64_t d = 0; d < head_dim; ++d) {
          const double v = as_double(tile.v[j * tile.ldv + d]);
          out[static_cast<size_t>(d)] += weight * v;
          largest_v = std::max(largest_v, std::fabs(v));
        }
      }
    }
    const double n_op = static_cast<double>(score.size() + 3 * tiles.size() + 8);
    const double e = 2 * slack + kUnit * (top - bottom + 1) + 0x1p-22 + gamma(n_op);
    ASSERT_NEAR(state.max[r] + std::log(double{state.sum[r]}), top + std::log(total), e);
    for (int64_t d = 0; d < head_dim; ++d) {
      ASSERT_NEAR(double{state.out[r * head_dim + d]} / state.sum[r], out[static_cast<size_t>(d)] / total,
                  2 * e * largest_v)
          << "row " << r << " of " << n_row << " coordinate " << d << " of " << head_dim;
    }
  }
}

Array<float> make_query(int64_t n_row, int64_t head_dim, Random& random, float sigma = 1) {
  Array<float> q(n_row * head_dim);
  fill_normal(q, n_row, head_dim, head_dim, random, sigma / std::sqrt(static_cast<float>(head_dim)));
  return q;
}

template <class T>
void check(const Ops& ops, int64_t n_row, int64_t head_dim, const std::vector<int64_t>& lengths,
           float sigma = 1) {
  Random random(static_cast<uint32_t>(n_row * 1000 + head_dim));
  const Array<float> q = make_query(n_row, head_dim, random, sigma);
  State state(n_row, head_dim);
  std::vector<Tile<T>> tiles;
  for (const int64_t n : lengths) {
    tiles.push_back(make_tile<T>(n, head_dim, random));
    run(ops, q, n_row, head_dim, tiles.back(), state);
  }
  expect_softmax(q, n_row, head_dim, tiles, state);
}

TEST_P(Attend, EveryGroupSizeAndHeadDim) {
  for (const int64_t head_dim : thinned<int64_t>({32, 64, 80, 96, 100, 128})) {
    for (int64_t n_row = 1; n_row <= 17; ++n_row) {
      check<float>(ops(), n_row, head_dim, {64, 7, 63});
      check<f16_t>(ops(), n_row, head_dim, {64, 7, 63});
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Attend, EveryTileLength) {
  for (int64_t n = 0; n <= kTile; ++n) {
    check<float>(ops(), 3, 20, {n});
    check<f16_t>(ops(), 7, 20, {n, 0, n});
    if (HasFatalFailure()) return;
  }
}

// Scores of +-100 and more: weights that vanish, maxima that move in most tiles.
TEST_P(Attend, LargeScores) { check<float>(ops(), 4, 64, {64, 64, 64, 64, 33}, 40); }

TEST_P(Attend, ManyTiles) { check<f16_t>(ops(), 3, 64, std::vector<int64_t>(100, 64)); }

TEST_P(Attend, OneKeyGivesItsValue) {
  Random random(5);
  const Array<float> q = make_query(2, 64, random);
  State state(2, 64);
  const Tile<float> tile = make_tile<float>(1, 64, random);
  run(ops(), q, 2, 64, tile, state);
  for (int64_t r = 0; r < 2; ++r) {
    EXPECT_EQ(state.sum[r], 1);
    for (int64_t d = 0; d < 64; ++d) EXPECT_EQ(state.out[r * 64 + d], tile.v[d]);
  }
}

// Weights one by one: key 0 scores 0, key j scores x_j <= 0, v is the identity, so out[j] = exp(x_j).
TEST_P(Attend, WeightsAreExponentials) {
  constexpr int64_t kDim = kTile;
  Array<float> q(kDim);
  Array<float> k_t(kDim * kTile);
  Array<float> v(kTile * kDim);
  for (int64_t i = 0; i < kDim * kTile; ++i) {
    k_t[i] = 0;
    v[i] = i % (kDim + 1) == 0 ? 1.0F : 0.0F;
  }
  for (int64_t d = 0; d < kDim; ++d) q[d] = d == 0 ? 1.0F : 0.0F;
  Random random(12);
  std::uniform_real_distribution<float> exponent(-25, 6.6F);
  for (int round = 0; round < 500; ++round) {
    for (int64_t j = 1; j < kTile; ++j) k_t[j] = -std::exp2(exponent(random));  // -97 .. -3e-8
    State state(1, kDim);
    ops().attend_f32(q.data(), 1, kDim, k_t.data(), kTile, v.data(), kDim, kTile, state.rows());
    ASSERT_EQ(state.out[0], 1);
    for (int64_t j = 1; j < kTile; ++j) {
      const double expected = std::exp(double{k_t[j]});
      ASSERT_NEAR(state.out[j], expected, expected * 0x1p-22 + 0x1p-125) << k_t[j];
    }
  }
}

TEST_P(Attend, MinusInfinityScoresWeighNothing) {
  constexpr int64_t kDim = 16;
  Array<float> q(kDim);
  Array<float> k_t(kDim * kTile);
  Array<float> v(kTile * kDim);
  for (int64_t d = 0; d < kDim; ++d) q[d] = d == 0 ? 1.0F : 0.0F;
  for (int64_t i = 0; i < kDim * kTile; ++i) k_t[i] = 0;
  for (int64_t i = 0; i < kDim * kTile; ++i) v[i] = static_cast<float>(i / kDim);
  for (int64_t j = 0; j < kTile; ++j) k_t[j] = -kInf;
  State state(1, kDim);
  const auto attend = [&] {
    ops().attend_f32(q.data(), 1, kDim, k_t.data(), kTile, v.data(), kDim, kTile, state.rows());
  };
  attend();  // nothing but masked keys: the state stays empty
  EXPECT_EQ(state.max[0], -kInf);
  EXPECT_EQ(state.sum[0], 0);
  EXPECT_EQ(state.out[0], 0);
  k_t[5] = 2;
  k_t[9] = 2;
  attend();
  EXPECT_EQ(state.max[0], 2);
  EXPECT_EQ(state.sum[0], 2);
  EXPECT_EQ(state.out[0], 14);
  k_t[5] = k_t[9] = -kInf;
  attend();  // a masked tile after others changes nothing
  EXPECT_EQ(state.max[0], 2);
  EXPECT_EQ(state.sum[0], 2);
  EXPECT_EQ(state.out[0], 14);
}

TEST_P(Attend, NonFiniteInputsDoNotCrashAndAreNotHidden) {
  Random random(6);
  for (const float bad : {kNaN, kInf}) {
    for (int64_t where = 0; where < 3; ++where) {
      Array<float> q = make_query(3, 64, random);
      Tile<float> tile = make_tile<float>(64, 64, random);
      State state(3, 64);
      if (where == 0) q[64 + 7] = bad;
      if (where == 1) tile.k_t[3 * tile.ldk + 20] = bad;
      if (where == 2) tile.v[9 * tile.ldv + 7] = bad;
      run(ops(), q, 3, 64, tile, state);
      // Row 1 has met the bad number in each case; infinity in q or k gives scores of either sign.
      if (!(bad == kInf && where == 1)) {
        EXPECT_FALSE(std::isfinite(state.out[64 + 7] / state.sum[1])) << bad << where;
      }
    }
  }
}

// Decode's use: each thread attends to its tiles, the states are merged in any order.
TEST_P(Attend, MergedStatesEqualOne) {
  constexpr int64_t kRows = 7;
  constexpr int64_t kDim = 64;
  Random random(11);
  const Array<float> q = make_query(kRows, kDim, random, 10);
  std::vector<Tile<f16_t>> tiles;
  std::vector<State> states;
  for (const int64_t n : {0, 64, 1, 0, 63}) {
    tiles.push_back(make_tile<f16_t>(n, kDim, random));
    states.emplace_back(kRows, kDim);
    run(ops(), q, kRows, kDim, tiles.back(), states.back());
  }
  for (const std::vector<int>& order : {std::vector<int>{0, 1, 2, 3, 4}, std::vector<int>{4, 3, 2, 1, 0}}) {
    State all(kRows, kDim);
    for (const int i : order) softmax_merge(all.rows(), states[static_cast<size_t>(i)].rows(), kRows, kDim);
    expect_softmax(q, kRows, kDim, tiles, all);
  }
}

TEST(SoftmaxState, EmptyMergedWithEmptyStaysEmpty) {
  State a(2, 8);
  State b(2, 8);
  softmax_merge(a.rows(), b.rows(), 2, 8);
  Array<float> y(16);
  softmax_normalise(a.rows(), 2, 8, y.data());
  for (int64_t i = 0; i < 2; ++i) {
    EXPECT_EQ(a.max[i], -kInf);
    EXPECT_EQ(a.sum[i], 0);
  }
  for (int64_t i = 0; i < 16; ++i) EXPECT_EQ(y[i], 0);
}

TEST(SoftmaxState, NormaliseInPlace) {
  State a(1, 3);
  a.max[0] = 3;
  a.sum[0] = 4;
  for (int64_t i = 0; i < 3; ++i) a.out[i] = static_cast<float>(i) * 2;
  softmax_normalise(a.rows(), 1, 3, a.out.data());
  for (int64_t i = 0; i < 3; ++i) EXPECT_EQ(a.out[i], static_cast<float>(i) / 2);
}

NARROWS_EACH_TARGET(Attend);

}  // namespace
}  // namespace narrows::kernels
