// gemm, gemm_f16, gemm_bf16 on every target against double: sizes around every block, strides with NaN behind
// the row.
#include <vector>

#include "kernels/bf16.h"
#include "kernels/kernel_test.h"

namespace narrows::kernels {
namespace {

class Gemm : public EachTarget {};

struct Shape {
  int64_t m, n, k;
};

template <class T>
void run(const Ops& ops, const Shape& s, const float* a, int64_t lda, const T* b, int64_t ldb, float* c,
         int64_t ldc, bool accumulate) {
  if constexpr (std::is_same_v<T, float>) {
    ops.gemm(s.m, s.n, s.k, a, lda, b, ldb, c, ldc, accumulate);
  } else {
    ops.gemm_f16(s.m, s.n, s.k, a, lda, b, ldb, c, ldc, accumulate);
  }
}

/// b as T. Every element of c within the bound of a float dot product; what is behind the rows of c
/// untouched.
template <class T>
void check(const Ops& ops, const Shape& s, bool accumulate, const Array<float>& a, int64_t lda,
           const Array<T>& b, int64_t ldb, Random& random) {
  const int64_t ldc = s.n + 5;
  Array<float> c((s.m - 1) * ldc + s.n);
  if (accumulate) fill_normal(c, s.m, s.n, ldc, random);
  Array<float> before(c.size());
  for (int64_t i = 0; i < c.size(); ++i) before[i] = c[i];
  run<T>(ops, s, a.data(), lda, b.data(), ldb, c.data(), ldc, accumulate);
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      double sum = accumulate ? double{before[i * ldc + j]} : 0.0;
      double size = std::fabs(sum);
      for (int64_t p = 0; p < s.k; ++p) {
        const double term = double{a[i * lda + p]} * as_double(b[p * ldb + j]);
        sum += term;
        size += std::fabs(term);
      }
      // k products and additions (two roundings a term without FMA), one addition to c.
      ASSERT_LE(std::fabs(c[i * ldc + j] - sum), gamma(static_cast<double>(s.k) + 2) * size)
          << s.m << " " << s.n << " " << s.k << " at " << i << " " << j;
    }
    for (int64_t j = s.n; j < ldc && i * ldc + j < c.size(); ++j) ASSERT_TRUE(std::isnan(c[i * ldc + j]));
  }
}

/// The product of factors rounded to bfloat16, within the bound of a float dot product of the ROUNDED
/// factors.
void check_bf16(const Ops& ops, const Shape& s, bool accumulate, const Array<float>& a, int64_t lda,
                const Array<float>& b, int64_t ldb, Random& random) {
  const int64_t ldc = s.n + 5, ldw = s.n + 1, n_word = (s.k + 1) / 2;
  Array<uint32_t> words(n_word == 0 ? 0 : (n_word - 1) * ldw + s.n);
  ops.pack_bf16(b.data(), ldb, s.k, s.n, words.data(), ldw);
  const auto b_at = [&](int64_t p, int64_t j) {
    const uint32_t word = words[p / 2 * ldw + j];
    return bf16_to_float(static_cast<uint16_t>(p % 2 == 0 ? word : word >> 16));
  };
  for (int64_t p = 0; p < s.k; ++p) {
    for (int64_t j = 0; j < s.n; ++j) ASSERT_EQ(b_at(p, j), round_to_bf16(b[p * ldb + j])) << p << " " << j;
  }
  if (s.k % 2 != 0) {
    ASSERT_EQ(words[s.k / 2 * ldw] >> 16, 0U);
  }
  Array<float> c((s.m - 1) * ldc + s.n);
  if (accumulate) fill_normal(c, s.m, s.n, ldc, random);
  Array<float> before(c.size());
  for (int64_t i = 0; i < c.size(); ++i) before[i] = c[i];
  ops.gemm_bf16(s.m, s.n, s.k, a.data(), lda, words.data(), ldw, c.data(), ldc, accumulate);
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      double sum = accumulate ? double{before[i * ldc + j]} : 0.0;
      double size = std::fabs(sum);
      for (int64_t p = 0; p < s.k; ++p) {
        const double term = double{round_to_bf16(a[i * lda + p])} * double{b_at(p, j)};
        sum += term;
        size += std::fabs(term);
      }
      ASSERT_LE(std::fabs(c[i * ldc + j] - sum), gamma(static_cast<double>(s.k) + 2) * size)
          << s.m << " " << s.n << " " << s.k << " at " << i << " " << j;
    }
    for (int64_t j = s.n; j < ldc && i * ldc + j < c.size(); ++j) ASSERT_TRUE(std::isnan(c[i * ldc + j]));
  }
}

void check_shape(const Ops& ops, const Shape& s, uint32_t seed) {
  Random random(seed);
  const int64_t lda = s.k + 3;
  const int64_t ldb = s.n + 2;
  Array<float> a((s.m - 1) * lda + s.k);
  fill_normal(a, s.m, s.k, lda, random);
  Array<float> b(s.k == 0 ? 0 : (s.k - 1) * ldb + s.n);
  fill_normal(b, s.k, s.n, ldb, random);
  const Array<f16_t> half = to_halves(b);
  for (const bool accumulate : {false, true}) {
    check<float>(ops, s, accumulate, a, lda, b, ldb, random);
    check<f16_t>(ops, s, accumulate, a, lda, half, ldb, random);
    check_bf16(ops, s, accumulate, a, lda, b, ldb, random);
  }
}

TEST_P(Gemm, EveryRowAndColumnCount) {
  for (int64_t m = 1; m <= 13; ++m) {
    for (int64_t n = 1; n <= 70; n += m % 2 == 0 ? 1 : 3) {
      check_shape(ops(), {m, n, 5}, static_cast<uint32_t>(m * 100 + n));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Gemm, TileShapes) {
  for (const Shape& s : {Shape{64, 64, 24}, Shape{64, 64, 48}, Shape{64, 64, 64}, Shape{64, 64, 128},
                         Shape{64, 63, 80}, Shape{7, 64, 96}, Shape{1, 1, 1}, Shape{80, 64, 1}}) {
    check_shape(ops(), s, 7);
    if (HasFatalFailure()) return;
  }
}

TEST_P(Gemm, DepthBeyondOneBlock) {
  for (const int64_t k : {255, 256, 257, 700}) {
    check_shape(ops(), {7, 33, k}, 9);
    if (HasFatalFailure()) return;
  }
}

TEST_P(Gemm, EmptyDepthClearsOrKeeps) { check_shape(ops(), {7, 21, 0}, 1); }

TEST_P(Gemm, NonFiniteInputsStayInTheirRowAndColumn) {
  constexpr int64_t kSize = 20;
  Random random(3);
  Array<float> a(kSize * kSize);
  Array<float> b(kSize * kSize);
  Array<float> c(kSize * kSize);
  fill_normal(a, kSize, kSize, kSize, random);
  fill_normal(b, kSize, kSize, kSize, random);
  a[3 * kSize + 4] = kInf;
  b[6 * kSize + 17] = kNaN;
  ops().gemm(kSize, kSize, kSize, a.data(), kSize, b.data(), kSize, c.data(), kSize, false);
  for (int64_t i = 0; i < kSize; ++i) {
    for (int64_t j = 0; j < kSize; ++j) {
      EXPECT_EQ(std::isnan(c[i * kSize + j]), j == 17) << i << " " << j;
      if (j != 17) {
        EXPECT_EQ(std::isinf(c[i * kSize + j]), i == 3) << i << " " << j;
      }
    }
  }
}

NARROWS_EACH_TARGET(Gemm);

}  // namespace
}  // namespace narrows::kernels
