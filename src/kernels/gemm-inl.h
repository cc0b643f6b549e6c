// The register block under gemm and attend: a few rows of c times a few vectors of columns
// stay in registers while k runs; a is broadcast one element a row, b is streamed one vector a column block.
//
//        b [k, n]   NV vectors ->      32 registers (AVX-512, NEON): 6 rows x 4 vectors = 24 accumulators,
//   a  +------------------------+      and 4 of b and 1 of a = 29. 16 registers: 6 x 2 + 2 + 1 = 15.
//   MR |  c block, in registers |      24 (12) independent chains also cover the latency of the FMA: 4
//      +------------------------+      cycles at 1 (2) a cycle need 4 (8).

// clang-format off
#if defined(NARROWS_KERNELS_GEMM_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NARROWS_KERNELS_GEMM_INL_H
#undef NARROWS_KERNELS_GEMM_INL_H
#else
#define NARROWS_KERNELS_GEMM_INL_H
#endif
// clang-format on

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4
inline constexpr int kBlockVectors = 2;
#else
inline constexpr int kBlockVectors = 4;
#endif

// Zen 4 loses up to a third of its 512-bit multiply-adds in short loops of other than 12 or 24 of them
// (measured with 4 x 4, 5 x 4 and 8 x 2 blocks); four steps of k in a row bring them back. With narrower
// vectors this costs more in spilled registers than it gains.
#undef NARROWS_UNROLL_DEPTH
#if !(HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL)
#define NARROWS_UNROLL_DEPTH
#elif HWY_COMPILER_CLANG
#define NARROWS_UNROLL_DEPTH _Pragma("clang loop unroll_count(4)")
#else
#define NARROWS_UNROLL_DEPTH _Pragma("GCC unroll 4")
#endif

inline constexpr int kBlockRows = 6;
inline constexpr int64_t kBlockColumns = kBlockVectors * kLanes;

/// acc [MR][NV] += a [MR, 1] b [1, NV vectors]. kTail: the last vector has only n_tail lanes in memory.
template <int MR, int NV, bool kTail, class T>
HWY_INLINE void block_step(const float* HWY_RESTRICT a, int64_t lda, const T* HWY_RESTRICT b, int64_t n_tail,
                           VF (&acc)[MR][NV]) {
  const DF d;
  VF column[NV];
  NARROWS_UNROLL
  for (int j = 0; j < NV; ++j) {
    column[j] =
        kTail && j == NV - 1 ? load_float_n(d, b + j * kLanes, n_tail) : load_float(d, b + j * kLanes);
  }
  NARROWS_UNROLL
  for (int i = 0; i < MR; ++i) {
    const VF row = hn::Set(d, a[i * lda]);
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = hn::MulAdd(row, column[j], acc[i][j]);
  }
}

/// acc [MR][NV] += a [MR, k] b [k, NV vectors].
template <int MR, int NV, bool kTail, class T>
HWY_INLINE void block_product(int64_t k, const float* HWY_RESTRICT a, int64_t lda, const T* HWY_RESTRICT b,
                              int64_t ldb, int64_t n_tail, VF (&acc)[MR][NV]) {
  NARROWS_UNROLL_DEPTH
  for (int64_t p = 0; p < k; ++p) block_step<MR, NV, kTail>(a + p, lda, b + p * ldb, n_tail, acc);
}

/// c [MR, NV vectors] (+)= acc.
template <int MR, int NV, bool kTail>
HWY_INLINE void store_block(VF (&acc)[MR][NV], int64_t n_tail, float* HWY_RESTRICT c, int64_t ldc,
                            bool accumulate) {
  const DF d;
  NARROWS_UNROLL
  for (int i = 0; i < MR; ++i) {
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* to = c + i * ldc + j * kLanes;
      if (kTail && j == NV - 1) {
        if (accumulate) acc[i][j] = hn::Add(acc[i][j], load_n(d, to, n_tail));
        store_n(acc[i][j], d, to, n_tail);
      } else {
        if (accumulate) acc[i][j] = hn::Add(acc[i][j], hn::LoadU(d, to));
        hn::StoreU(acc[i][j], d, to);
      }
    }
  }
}

/// c [MR, NV vectors] (+)= a [MR, k] b.
template <int MR, int NV, bool kTail, class T>
HWY_INLINE void block_store(int64_t k, const float* HWY_RESTRICT a, int64_t lda, const T* HWY_RESTRICT b,
                            int64_t ldb, int64_t n_tail, float* HWY_RESTRICT c, int64_t ldc,
                            bool accumulate) {
  const DF d;
  VF acc[MR][NV];
  NARROWS_UNROLL
  for (int i = 0; i < MR; ++i) {
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = hn::Zero(d);
  }
  block_product<MR, NV, kTail>(k, a, lda, b, ldb, n_tail, acc);
  store_block<MR, NV, kTail>(acc, n_tail, c, ldc, accumulate);
}

/// One column block for all m rows.
template <int NV, bool kTail, class T>
HWY_INLINE void column_block(int64_t m, int64_t k, const float* a, int64_t lda, const T* b, int64_t ldb,
                             int64_t n_tail, float* c, int64_t ldc, bool accumulate) {
  for (; m >= kBlockRows; m -= kBlockRows, a += kBlockRows * lda, c += kBlockRows * ldc) {
    block_store<kBlockRows, NV, kTail>(k, a, lda, b, ldb, n_tail, c, ldc, accumulate);
  }
  switch (m) {
    case 1:
      return block_store<1, NV, kTail>(k, a, lda, b, ldb, n_tail, c, ldc, accumulate);
    case 2:
      return block_store<2, NV, kTail>(k, a, lda, b, ldb, n_tail, c, ldc, accumulate);
    case 3:
      return block_store<3, NV, kTail>(k, a, lda, b, ldb, n_tail, c, ldc, accumulate);
    case 4:
      return block_store<4, NV, kTail>(k, a, lda, b, ldb, n_tail, c, ldc, accumulate);
    case 5:
      return block_store<5, NV, kTail>(k, a, lda, b, ldb, n_tail, c, ldc, accumulate);
    default:
      return;
  }
}

/// Rows of b that are worked on at once: 256 x 64 columns of float are 64 KB, which L2 holds beside a and c.
inline constexpr int64_t kBlockDepth = 256;

/// c [m, n] (+)= a [m, k] b [k, n].
template <class T>
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const T* b, int64_t ldb, float* c,
             int64_t ldc, bool accumulate) {
  if (k == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i) std::memset(c + i * ldc, 0, static_cast<size_t>(n) * sizeof(float));
  }
  for (int64_t p = 0; p < k; p += kBlockDepth) {
    const int64_t depth = k - p < kBlockDepth ? k - p : kBlockDepth;
    const bool add = accumulate || p > 0;
    int64_t j = 0;
    for (; j + kBlockColumns <= n; j += kBlockColumns) {
      column_block<kBlockVectors, false>(m, depth, a + p, lda, b + p * ldb + j, ldb, 0, c + j, ldc, add);
    }
    if (j == n) continue;
    const int64_t n_vector = (n - j + kLanes - 1) / kLanes;
    const int64_t n_tail = n - j - (n_vector - 1) * kLanes;
    const T* b_tail = b + p * ldb + j;
    switch (n_vector) {
      case 1:
        column_block<1, true>(m, depth, a + p, lda, b_tail, ldb, n_tail, c + j, ldc, add);
        break;
#if !(HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4)
      case 2:
        column_block<2, true>(m, depth, a + p, lda, b_tail, ldb, n_tail, c + j, ldc, add);
        break;
      case 3:
        column_block<3, true>(m, depth, a + p, lda, b_tail, ldb, n_tail, c + j, ldc, add);
        break;
#endif
      default:
        column_block<kBlockVectors, true>(m, depth, a + p, lda, b_tail, ldb, n_tail, c + j, ldc, add);
        break;
    }
  }
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD

#endif  // re-inclusion guard
