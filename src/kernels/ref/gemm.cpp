// Oracle: c [m, n] = a [m, k] b [k, n] (or +=), one dot product at a time in double.
#include "kernels/bf16.h"
#include "kernels/half.h"
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {
namespace {

double value(float x) { return x; }
double value(f16_t x) { return half_to_float(x); }

template <class T>
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const T* b, int64_t ldb, float* c,
             int64_t ldc, bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = accumulate ? double{c[i * ldc + j]} : 0.0;
      for (int64_t p = 0; p < k; ++p) sum += double{a[i * lda + p]} * value(b[p * ldb + j]);
      c[i * ldc + j] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool accumulate) {
  product(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

void gemm_f16(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const f16_t* b, int64_t ldb,
              float* c, int64_t ldc, bool accumulate) {
  product(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

void pack_bf16(const float* b, int64_t ldb, int64_t k, int64_t n, uint32_t* out, int64_t ldo) {
  for (int64_t p = 0; p < k; p += 2) {
    for (int64_t c = 0; c < n; ++c) {
      const uint32_t high = p + 1 < k ? float_to_bf16(b[(p + 1) * ldb + c]) : 0;
      out[p / 2 * ldo + c] = float_to_bf16(b[p * ldb + c]) | high << 16;
    }
  }
}

void gemm_bf16(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const uint32_t* b, int64_t ldb,
               float* c, int64_t ldc, bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = accumulate ? double{c[i * ldc + j]} : 0.0;
      for (int64_t p = 0; p < k; ++p) {
        const uint32_t word = b[p / 2 * ldb + j];
        const auto bits = static_cast<uint16_t>(p % 2 == 0 ? word : word >> 16);
        sum += double{round_to_bf16(a[i * lda + p])} * double{bf16_to_float(bits)};
      }
      c[i * ldc + j] = static_cast<float>(sum);
    }
  }
}

}  // namespace narrows::kernels::ref
