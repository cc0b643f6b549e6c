// gemm and gemm_f16: c [m, n] = a [m, k] b [k, n] or += ; the blocking is in gemm-inl.h.
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm.cpp"
#include <hwy/foreach_target.h>

#include "kernels/gemm-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool accumulate) {
  product(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

void gemm_f16(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const f16_t* b, int64_t ldb,
              float* c, int64_t ldc, bool accumulate) {
  product(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
