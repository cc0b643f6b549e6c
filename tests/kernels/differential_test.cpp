// Random sizes, strides and values with a fixed seed: every target against "ref". Copies and codes must agree
// to the bit, products and attention within the rounding bounds of gemm_test.cpp and attend_test.cpp.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/kernel_test.h"
#include "kernels/softmax_state.h"

namespace narrows::kernels {
namespace {

class Differential : public EachTarget {
 protected:
  static constexpr int kRounds = 160;

  int64_t draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  /// Normal values [m, n] in rows of ld, at an odd offset.
  Array<float> normal(int64_t m, int64_t n, int64_t ld, float sigma = 1) {
    Array<float> x(m == 0 ? 0 : (m - 1) * ld + n, draw(0, 3));
    fill_normal(x, m, n, ld, random_, sigma);
    return x;
  }

  const Ops& ref() const { return *available_targets().back(); }

  Random random_{20240229};
};

template <class T>
void expect_same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  ASSERT_EQ(a.size(), b.size());
  ASSERT_TRUE(a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

double max_abs(const Array<float>& x) {
  double top = 0;
  for (int64_t i = 0; i < x.size(); ++i) {
    if (!std::isnan(x[i])) top = std::max(top, std::fabs(double{x[i]}));
  }
  return top;
}

TEST_P(Differential, Conversions) {
  for (int round = 0; round < kRounds; ++round) {
    const int64_t n = draw(0, 300);
    Array<float> x(n, draw(0, 15));
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = static_cast<uint32_t>(random_());
      std::memcpy(&x[i], &bits, sizeof bits);
      if (draw(0, 3) > 0 && std::isfinite(x[i]))
        x[i] = std::ldexp(x[i], -std::ilogb(x[i]) + static_cast<int>(draw(-28, 17)));
    }
    std::vector<f16_t> half(static_cast<size_t>(n));
    std::vector<f16_t> half_ref(static_cast<size_t>(n));
    ops().f32_to_f16(x.data(), half.data(), n);
    ref().f32_to_f16(x.data(), half_ref.data(), n);
    expect_same_bits(half, half_ref);
    std::vector<float> back(static_cast<size_t>(n));
    std::vector<float> back_ref(static_cast<size_t>(n));
    ops().f16_to_f32(half.data(), back.data(), n);
    ref().f16_to_f32(half.data(), back_ref.data(), n);
    expect_same_bits(back, back_ref);
    if (HasFatalFailure()) return;
  }
}

TEST_P(Differential, Products) {
  for (int round = 0; round < kRounds / 2; ++round) {
    const int64_t m = draw(1, 40);
    const int64_t n = draw(1, 100);
    const int64_t k = draw(1, 200);
    const int64_t lda = k + draw(0, 9);
    const int64_t ldb = n + draw(0, 9);
    const int64_t ldc = n + draw(0, 9);
    const bool accumulate = draw(0, 1) == 1;
    const Array<float> a = normal(m, k, lda);
    const Array<float> b = normal(k, n, ldb);
    const Array<f16_t> half = to_halves(b);
    const Array<float> c0 = normal(m, n, ldc);
    // Every term is at most max|a| max|b|; "ref" rounds once, which the 3 covers.
    const double bound = gamma(static_cast<double>(k) + 3) *
                         (static_cast<double>(k) * max_abs(a) * max_abs(b) * (1 + 0x1p-10) + max_abs(c0));
    for (const bool in_half : {false, true}) {
      Array<float> got(c0.size());
      Array<float> expected(c0.size());
      for (int64_t i = 0; i < c0.size(); ++i) got[i] = expected[i] = c0[i];
      if (in_half) {
        ops().gemm_f16(m, n, k, a.data(), lda, half.data(), ldb, got.data(), ldc, accumulate);
        ref().gemm_f16(m, n, k, a.data(), lda, half.data(), ldb, expected.data(), ldc, accumulate);
      } else {
        ops().gemm(m, n, k, a.data(), lda, b.data(), ldb, got.data(), ldc, accumulate);
        ref().gemm(m, n, k, a.data(), lda, b.data(), ldb, expected.data(), ldc, accumulate);
      }
      for (int64_t i = 0; i < c0.size(); ++i) {
        ASSERT_EQ(std::isnan(got[i]), std::isnan(expected[i]));
        if (!std::isnan(got[i])) {
          ASSERT_NEAR(got[i], expected[i], bound) << m << " " << n << " " << k;
        }
      }
    }
  }
}

TEST_P(Differential, Attention) {
  for (int round = 0; round < kRounds / 2; ++round) {
    const int64_t n_row = draw(1, 20);
    const int64_t head_dim = draw(1, 130);
    const int64_t n = draw(1, kTile);
    const int64_t ldk = n + draw(0, 5);
    const int64_t ldv = head_dim + draw(0, 5);
    const float sigma = draw(0, 3) == 0 ? 10.0F : 1.0F;
    const Array<float> q = normal(n_row, head_dim, head_dim, sigma / std::sqrt(static_cast<float>(head_dim)));
    Array<float> state[2] = {Array<float>(n_row * (head_dim + 2)), Array<float>(n_row * (head_dim + 2))};
    SoftmaxRows rows[2];
    for (int i = 0; i < 2; ++i) {
      float* at = state[i].data();
      rows[i] = {at, at + n_row, at + 2 * n_row};
      softmax_clear(rows[i], n_row, head_dim);
    }
    double largest_score = 0;
    double largest_v = 0;
    const int n_tile = static_cast<int>(draw(1, 3));
    for (int tile = 0; tile < n_tile; ++tile) {
      const Array<float> k_t = normal(head_dim, n, ldk);
      const Array<float> v = normal(n, head_dim, ldv);
      const Array<f16_t> k_half = to_halves(k_t);
      const Array<f16_t> v_half = to_halves(v);
      for (int i = 0; i < 2; ++i) {
        const Ops& table = i == 0 ? ops() : ref();
        table.attend_f16(q.data(), n_row, head_dim, k_half.data(), ldk, v_half.data(), ldv, n, rows[i]);
      }
      largest_score = std::max(largest_score, static_cast<double>(head_dim) * max_abs(q) * max_abs(k_t));
      largest_v = std::max(largest_v, max_abs(v));
    }
    const double e = 2 * gamma(static_cast<double>(head_dim) + 2) * largest_score +
                     kUnit * 2 * largest_score + 0x1p-22 + gamma(static_cast<double>(n * n_tile) + 20);
    for (int64_t r = 0; r < n_row; ++r) {
      ASSERT_NEAR(rows[0].max[r] + std::log(rows[0].sum[r]), rows[1].max[r] + std::log(rows[1].sum[r]), e);
      for (int64_t d = 0; d < head_dim; ++d) {
        const int64_t at = r * head_dim + d;
        ASSERT_NEAR(rows[0].out[at] / rows[0].sum[r], rows[1].out[at] / rows[1].sum[r], 2 * e * largest_v)
            << n_row << " rows, head_dim " << head_dim << ", n " << n;
      }
    }
  }
}

TEST_P(Differential, Groups) {
  for (int round = 0; round < kRounds; ++round) {
    const int bits = draw(0, 1) == 0 ? 2 : 4;
    const int64_t n = draw(0, 500);
    const size_t n_group = static_cast<size_t>((n + kGroup - 1) / kGroup);
    const Array<float> x = normal(1, n, n, std::ldexp(1.0F, static_cast<int>(draw(-30, 12))));
    std::vector<uint8_t> codes(n_group * kGroup * static_cast<size_t>(bits) / 8, 0xEE);
    std::vector<uint8_t> codes_ref = codes;
    std::vector<f16_t> params(2 * n_group);
    std::vector<f16_t> params_ref(2 * n_group);
    ASSERT_EQ(ops().quant_groups(x.data(), n, bits, codes.data(), params.data()),
              ref().quant_groups(x.data(), n, bits, codes_ref.data(), params_ref.data()));
    expect_same_bits(codes, codes_ref);
    expect_same_bits(params, params_ref);
    std::vector<float> y(static_cast<size_t>(n));
    std::vector<float> y_ref(static_cast<size_t>(n));
    ops().dequant_groups(codes.data(), params.data(), n, bits, y.data());
    ref().dequant_groups(codes.data(), params.data(), n, bits, y_ref.data());
    expect_same_bits(y, y_ref);
    if (HasFatalFailure()) return;
  }
}

TEST_P(Differential, Selection) {
  for (int round = 0; round < kRounds; ++round) {
    const int64_t n = draw(1, 3000);
    const int64_t count = draw(0, n);
    Array<float> score = normal(1, n, n);
    const float step = std::ldexp(1.0F, static_cast<int>(draw(-12, 1)));  // coarse steps make ties
    for (int64_t i = 0; i < n; ++i) score[i] = std::nearbyint(score[i] / step) * step;
    std::vector<int32_t> got(static_cast<size_t>(count));
    std::vector<int32_t> expected(static_cast<size_t>(count));
    Array<uint64_t> scratch((select_scratch_bytes(n) + 7) / 8);
    ops().select_top(score.data(), n, count, got.data(), scratch.data());
    ref().select_top(score.data(), n, count, expected.data(), scratch.data());
    ASSERT_EQ(got, expected);
  }
}

NARROWS_EACH_TARGET(Differential);

}  // namespace
}  // namespace narrows::kernels
