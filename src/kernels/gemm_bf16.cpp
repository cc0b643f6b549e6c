// pack_bf16 and gemm_bf16: products whose factors are rounded to bfloat16, two steps of k in a 32-bit word,
// sums in float32. On CPUs with AVX512-BF16 by their products of pairs, twice the multiply-adds of float32;
// elsewhere the words are taken apart again, which costs no more than halves do.
#include "kernels/bf16.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm_bf16.cpp"
#include <hwy/foreach_target.h>

#include "kernels/gemm-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

/// Words of a row of `a` that are rounded at once.
constexpr int64_t kDepthWords = kBlockDepth / 2;

/// Bits of the nearest bfloat16 in the upper half of each lane; below them rubbish. x is finite.
HWY_INLINE VU round_upper(VF x) {
  const DU du;
  const VU bits = hn::BitCast(du, x);
  const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1U));
  return hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFFU)));
}

HWY_INLINE VU join_words(VF low, VF high) {
  const DU du;
  return hn::Or(hn::ShiftRight<16>(round_upper(low)), hn::And(round_upper(high), hn::Set(du, 0xFFFF0000U)));
}

HWY_INLINE VU load_words(const uint32_t* p) { return hn::LoadU(DU(), p); }
HWY_INLINE VU load_words_n(const uint32_t* p, int64_t n) {
  return hn::BitCast(DU(), load_n(DF(), reinterpret_cast<const float*>(p), n));
}

/// The words as two floats.
struct FloatPairs {
  struct Column {
    VF low, high;
  };
  using Word = float;  ///< of a rounded row of `a`
  static constexpr int kPer = 2;

  static HWY_INLINE Column column(VU words) {
    const DU du;
    return {hn::BitCast(DF(), hn::ShiftLeft<16>(words)),
            hn::BitCast(DF(), hn::And(words, hn::Set(du, 0xFFFF0000U)))};
  }
  static HWY_INLINE VF multiply_add(VF sum, const Column& b, const float* a) {
    const DF d;
    return hn::MulAdd(hn::Set(d, a[1]), b.high, hn::MulAdd(hn::Set(d, a[0]), b.low, sum));
  }
  static HWY_INLINE void round_row(const float* a, int64_t n, float* to) {
    const DF d;
    const DU du;
    int64_t p = 0;
    for (; p + kLanes <= n; p += kLanes) {
      const VU upper = hn::And(round_upper(hn::LoadU(d, a + p)), hn::Set(du, 0xFFFF0000U));
      hn::StoreU(hn::BitCast(d, upper), d, to + p);
    }
    for (; p < n; ++p) to[p] = round_to_bf16(a[p]);
    if (n % 2 != 0) to[n] = 0;
  }
};

#if HWY_TARGET == HWY_AVX3_DL
/// The words as they are; offered only where the CPU has these instructions (dispatch.cpp).
struct WordPairs {
  using Column = VU;
  using Word = uint32_t;
  static constexpr int kPer = 1;

  static HWY_INLINE VU column(VU words) { return words; }
  static HWY_INLINE VF multiply_add(VF sum, VU b, const uint32_t* a) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(b.raw), "m"(*a));
    return sum;
  }
  static HWY_INLINE void round_row(const float* a, int64_t n, uint32_t* to) {
    const DF d;
    for (int64_t p = 0; p < n; p += 2 * kLanes, to += kLanes) {
      const int64_t left = n - p;
      const __m512 low = load_n(d, a + p, left).raw;
      const __m512 high = left > kLanes ? load_n(d, a + p + kLanes, left - kLanes).raw : _mm512_setzero_ps();
      __m512i words;  // 16 numbers of `low`, then 16 of `high`: neighbours are pairs already
      asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(words) : "v"(low), "v"(high));
      _mm512_storeu_si512(to, words);
    }
  }
};
#endif

/// c [MR, NV vectors] (+)= a [MR, n_word words] b.
template <class Pairs, int MR, int NV, bool kTail>
HWY_INLINE void pair_block(int64_t n_word, const typename Pairs::Word* HWY_RESTRICT a,
                           const uint32_t* HWY_RESTRICT b, int64_t ldb, int64_t n_tail, float* HWY_RESTRICT c,
                           int64_t ldc, bool accumulate) {
  const DF d;
  VF acc[MR][NV];
  NARROWS_UNROLL
  for (int i = 0; i < MR; ++i) {
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = hn::Zero(d);
  }
  NARROWS_UNROLL_DEPTH
  for (int64_t p = 0; p < n_word; ++p) {
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) {
      const uint32_t* at = b + p * ldb + j * kLanes;
      const auto column = Pairs::column(kTail && j == NV - 1 ? load_words_n(at, n_tail) : load_words(at));
      NARROWS_UNROLL
      for (int i = 0; i < MR; ++i)
        acc[i][j] = Pairs::multiply_add(acc[i][j], column, a + (i * kDepthWords + p) * Pairs::kPer);
    }
  }
  store_block<MR, NV, kTail>(acc, n_tail, c, ldc, accumulate);
}

/// All columns for MR rows.
template <class Pairs, int MR>
void pair_rows(int64_t n, int64_t n_word, const typename Pairs::Word* a, const uint32_t* b, int64_t ldb,
               float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kBlockColumns <= n; j += kBlockColumns)
    pair_block<Pairs, MR, kBlockVectors, false>(n_word, a, b + j, ldb, 0, c + j, ldc, accumulate);
  for (; j + 2 * kLanes <= n; j += 2 * kLanes)
    pair_block<Pairs, MR, 2, false>(n_word, a, b + j, ldb, 0, c + j, ldc, accumulate);
  for (; j < n; j += kLanes)
    pair_block<Pairs, MR, 1, true>(n_word, a, b + j, ldb, std::min(n - j, kLanes), c + j, ldc, accumulate);
}

template <class Pairs>
void pair_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const uint32_t* b,
                  int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if (k == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i) std::memset(c + i * ldc, 0, static_cast<size_t>(n) * sizeof(float));
  }
  // A vector more: rounding writes whole ones.
  alignas(64) typename Pairs::Word rows[(kBlockRows * kDepthWords + kLanes) * Pairs::kPer];
  for (int64_t p = 0; p < k; p += kBlockDepth) {
    const int64_t depth = std::min(k - p, kBlockDepth), n_word = (depth + 1) / 2;
    const bool add = accumulate || p > 0;
    const uint32_t* from = b + p / 2 * ldb;
    for (int64_t i = 0; i < m; i += kBlockRows) {
      const int64_t n_row = std::min<int64_t>(m - i, kBlockRows);
      for (int64_t r = 0; r < n_row; ++r)
        Pairs::round_row(a + (i + r) * lda + p, depth, rows + r * kDepthWords * Pairs::kPer);
      float* to = c + i * ldc;
      switch (n_row) {
        case 1:
          pair_rows<Pairs, 1>(n, n_word, rows, from, ldb, to, ldc, add);
          break;
        case 2:
          pair_rows<Pairs, 2>(n, n_word, rows, from, ldb, to, ldc, add);
          break;
        case 3:
          pair_rows<Pairs, 3>(n, n_word, rows, from, ldb, to, ldc, add);
          break;
        case 4:
          pair_rows<Pairs, 4>(n, n_word, rows, from, ldb, to, ldc, add);
          break;
        case 5:
          pair_rows<Pairs, 5>(n, n_word, rows, from, ldb, to, ldc, add);
          break;
        default:
          pair_rows<Pairs, kBlockRows>(n, n_word, rows, from, ldb, to, ldc, add);
      }
    }
  }
}

}  // namespace

void pack_bf16(const float* b, int64_t ldb, int64_t k, int64_t n, uint32_t* out, int64_t ldo) {
  const DF d;
  for (int64_t p = 0; p < k; p += 2, b += 2 * ldb, out += ldo) {
    const bool has_high = p + 1 < k;
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
      const VF high = has_high ? hn::LoadU(d, b + ldb + c) : hn::Zero(d);
      hn::StoreU(join_words(hn::LoadU(d, b + c), high), DU(), out + c);
    }
    for (; c < n; ++c)
      out[c] = float_to_bf16(b[c]) | (has_high ? uint32_t{float_to_bf16(b[ldb + c])} << 16 : 0U);
  }
}

void gemm_bf16(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const uint32_t* b, int64_t ldb,
               float* c, int64_t ldc, bool accumulate) {
  pair_product<FloatPairs>(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

#if HWY_TARGET == HWY_AVX3_DL
void gemm_bf16_native(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const uint32_t* b,
                      int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  pair_product<WordPairs>(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}
#endif

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
