// Powers of two for softmax weights, of any float: exp2(-infinity) = 0, overflow gives infinity, NaN stays.

// clang-format off
#if defined(NARROWS_KERNELS_EXP2_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NARROWS_KERNELS_EXP2_INL_H
#undef NARROWS_KERNELS_EXP2_INL_H
#else
#define NARROWS_KERNELS_EXP2_INL_H
#endif
// clang-format on

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

/// 2^f on [0, 1]: minimax polynomials of the relative error with p(0) = 1, so that the largest key of a row
/// weighs exactly 1. Degree 3: 8.6e-5, far below the 2^-9 of a weight rounded to bfloat16. Degree 6: 2.0e-9.
template <int kDegree>
HWY_INLINE VF exp2_fraction(DF d, VF f) {
  static_assert(kDegree == 3 || kDegree == 6);
  if constexpr (kDegree == 3) {
    VF p = hn::MulAdd(hn::Set(d, 0.0770670697F), f, hn::Set(d, 0.227644965F));
    p = hn::MulAdd(p, f, hn::Set(d, 0.695116818F));
    return hn::MulAdd(p, f, hn::Set(d, 1.0F));
  } else {
    VF p = hn::MulAdd(hn::Set(d, 2.16129192e-4F), f, hn::Set(d, 1.24678458e-3F));
    p = hn::MulAdd(p, f, hn::Set(d, 9.67545155e-3F));
    p = hn::MulAdd(p, f, hn::Set(d, 5.54852821e-2F));
    p = hn::MulAdd(p, f, hn::Set(d, 2.40229309e-1F));
    p = hn::MulAdd(p, f, hn::Set(d, 6.93147063e-1F));
    return hn::MulAdd(p, f, hn::Set(d, 1.0F));
  }
}

/// Results below 2^-126 may be 0.
template <int kDegree>
HWY_INLINE VF exp2_any(DF d, VF x) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  const VF f{_mm512_reduce_ps(x.raw, 0x9)};  // x - floor(x); 0 for infinities
  return VF{_mm512_scalef_ps(exp2_fraction<kDegree>(d, f).raw, x.raw)};
#else
  // NaN stays NaN. The second operand is what x86 returns if one is NaN; on ARM Highway's Min and Max return
  // the number.
#if HWY_TARGET == HWY_NEON
  x = VF{vminq_f32(vmaxq_f32(x.raw, vdupq_n_f32(-127.0F)), vdupq_n_f32(128.0F))};
#else
  x = hn::Min(hn::Set(d, 128.0F), hn::Max(hn::Set(d, -127.0F), x));
#endif
  const VF whole = hn::Floor(x);
  const VF p = exp2_fraction<kDegree>(d, hn::Sub(x, whole));
  const DI di;
  const auto exponent = hn::Add(hn::ConvertTo(di, whole), hn::Set(di, 127));
  const VF power = hn::BitCast(d, hn::ShiftLeft<23>(exponent));
  // NaN became some exponent; p is still NaN.
  return hn::Mul(p, power);
#endif
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD

#endif  // re-inclusion guard
