// Products of unsigned and signed bytes, four to an int32 lane, on x86's targets. Re-included by
// foreach_target.

// clang-format off
#if defined(NARROWS_KERNELS_BYTE_PRODUCTS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NARROWS_KERNELS_BYTE_PRODUCTS_INL_H
#undef NARROWS_KERNELS_BYTE_PRODUCTS_INL_H
#else
#define NARROWS_KERNELS_BYTE_PRODUCTS_INL_H
#endif
// clang-format on

#include "kernels/simd-inl.h"

/// x86 has products of unsigned and signed bytes in all our targets.
#undef NARROWS_BYTE_PRODUCTS
#if HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4
#define NARROWS_BYTE_PRODUCTS 1
#else
#define NARROWS_BYTE_PRODUCTS 0
#endif

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

using DB = hn::Repartition<uint8_t, DF>;
using DS = hn::Repartition<int16_t, DF>;
using VB = hn::Vec<DB>;
using VI = hn::Vec<DI>;
using VS = hn::Vec<DS>;
/// Bytes in a vector.
inline constexpr int64_t kByteLanes = 4 * kLanes;

#if NARROWS_BYTE_PRODUCTS

/// Unsigned bytes a times signed bytes b, neighbours added: 16 bits, which saturate.
HWY_INLINE VS pair_products(VB a, VB b) {
#if HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_AVX3
  return VS{_mm512_maddubs_epi16(a.raw, b.raw)};
#elif HWY_TARGET == HWY_AVX2
  return VS{_mm256_maddubs_epi16(a.raw, b.raw)};
#else
  return VS{_mm_maddubs_epi16(a.raw, b.raw)};
#endif
}

/// Neighbours of 16 bits added.
HWY_INLINE VI add_pairs(VS x) {
#if HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_AVX3
  return VI{_mm512_madd_epi16(x.raw, _mm512_set1_epi16(1))};
#elif HWY_TARGET == HWY_AVX2
  return VI{_mm256_madd_epi16(x.raw, _mm256_set1_epi16(1))};
#else
  return VI{_mm_madd_epi16(x.raw, _mm_set1_epi16(1))};
#endif
}

/// sum += products of unsigned bytes a (at most 128 where there is no VNNI) and signed bytes b >= -127.
HWY_INLINE VI add_products(VI sum, VB a, VB b) {
#if HWY_TARGET == HWY_AVX3_DL
  // Highway's target has VNNI (it checks the CPU for it) but 1.0.3 does not tell the compiler so.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
  return sum;
#else
  return hn::Add(sum, add_pairs(pair_products(a, b)));
#endif
}

/// sum += products of unsigned bytes a and the same four signed bytes at b for every lane; limits as above.
HWY_INLINE VI add_products_of_four(VI sum, VB a, const int8_t* b) {
  int32_t four = 0;
  std::memcpy(&four, b, sizeof(four));
#if HWY_TARGET == HWY_AVX3_DL
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "m"(*reinterpret_cast<const int32_t*>(b)));
  return sum;
#else
  return add_products(sum, a, hn::BitCast(DB(), hn::Set(DI(), four)));
#endif
}
#endif  // NARROWS_BYTE_PRODUCTS

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD

#endif  // re-inclusion guard
