// The small vector vocabulary of the kernels, once a target: loads and stores of the first n lanes that touch
// no other memory, half precision, exp of non-positive numbers, the logistic function. Re-included by
// foreach_target.

// clang-format off
#if defined(NARROWS_KERNELS_SIMD_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NARROWS_KERNELS_SIMD_INL_H
#undef NARROWS_KERNELS_SIMD_INL_H
#else
#define NARROWS_KERNELS_SIMD_INL_H
#endif
// clang-format on

#include <cstring>

#include "kernels/kernels-inl.h"

/// Loops over a register block must vanish: an indexed array of vectors would live in memory.
#undef NARROWS_UNROLL
#if HWY_COMPILER_CLANG
#define NARROWS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define NARROWS_UNROLL _Pragma("GCC unroll 16")
#endif

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DU = hn::RebindToUnsigned<DF>;
using DI = hn::RebindToSigned<DF>;
using DH = hn::Rebind<uint16_t, DF>;  ///< as many halves as DF has floats, as bits
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;
using VH = hn::Vec<DH>;

/// Floats in a vector. Fixed at compile time: scalable targets are excluded in targets.h.
inline constexpr int64_t kLanes = HWY_LANES(float);

// Highway 1.0.3 emulates masked loads by full ones where the CPU has none, which may cross into an unmapped
// page: there the lanes are put together from smaller loads.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
#define NARROWS_MASKED_F32 1
#define NARROWS_MASKED_F16 1
#elif HWY_TARGET == HWY_AVX2
#define NARROWS_MASKED_F32 1
#define NARROWS_MASKED_F16 0
#else
#define NARROWS_MASKED_F32 0
#define NARROWS_MASKED_F16 0
#endif

/// The first n < 4 halves at p in the low bits, the rest 0 (little-endian, as all our targets are).
HWY_INLINE uint64_t load_few(const f16_t* p, int64_t n) {
  uint64_t bits = 0;
  if ((n & 2) != 0) {
    uint32_t two = 0;
    std::memcpy(&two, p, sizeof(two));
    bits = two;
  }
  if ((n & 1) != 0) bits |= uint64_t{p[n - 1]} << (16 * (n - 1));
  return bits;
}

/// The first n <= lanes elements at p; the other lanes are 0.
HWY_INLINE VF load_n(DF d, const float* p, int64_t n) {
#if NARROWS_MASKED_F32
  return hn::MaskedLoad(hn::FirstN(d, static_cast<size_t>(n)), d, p);
#else
  static_assert(kLanes == 4);
  if (n == 4) return hn::LoadU(d, p);
  if (n == 0) return hn::Zero(d);
  const hn::Half<DF> half;
  const auto one = hn::FirstN(half, 1);
  const auto low = n == 1 ? hn::IfThenElseZero(one, hn::Set(half, p[0])) : hn::LoadU(half, p);
  const auto high = n == 3 ? hn::IfThenElseZero(one, hn::Set(half, p[2])) : hn::Zero(half);
  return hn::Combine(d, high, low);
#endif
}

HWY_INLINE VH load_n(DH d, const f16_t* p, int64_t n) {
#if NARROWS_MASKED_F16
  return hn::MaskedLoad(hn::FirstN(d, static_cast<size_t>(n)), d, p);
#else
  // Through integer registers: a buffer in memory would be read wider than it was written, which stalls.
  uint64_t word[2] = {0, 0};
  if (n >= 4) std::memcpy(&word[0], p, sizeof(word[0]));
  if (kLanes == 8 && n == 8) {
    std::memcpy(&word[1], p + 4, sizeof(word[1]));
  } else if (n != 4) {
    word[n / 4] = load_few(p + n / 4 * 4, n % 4);
  }
  const hn::Repartition<uint64_t, DH> d64;
  if constexpr (kLanes == 4) {
    return hn::BitCast(d, hn::Set(d64, word[0]));
  } else {
    return hn::BitCast(d, hn::InterleaveLower(d64, hn::Set(d64, word[0]), hn::Set(d64, word[1])));
  }
#endif
}

HWY_INLINE void store_n(VF v, DF d, float* p, int64_t n) {
#if NARROWS_MASKED_F32
  hn::BlendedStore(v, hn::FirstN(d, static_cast<size_t>(n)), d, p);
#else
  HWY_ALIGN float lane[kLanes];
  hn::Store(v, d, lane);
  std::memcpy(p, lane, static_cast<size_t>(n) * sizeof(float));
#endif
}

HWY_INLINE void store_n(VH v, DH d, f16_t* p, int64_t n) {
#if NARROWS_MASKED_F16
  hn::BlendedStore(v, hn::FirstN(d, static_cast<size_t>(n)), d, p);
#else
  HWY_ALIGN f16_t lane[kLanes];
  hn::Store(v, d, lane);
  std::memcpy(p, lane, static_cast<size_t>(n) * sizeof(f16_t));
#endif
}

/// Halves to floats, all values (subnormal, infinite, NaN).
HWY_INLINE VF to_float(DF d, VH half) {
#if HWY_TARGET == HWY_SSE4
  // No F16C, and Highway's emulation turns infinities into numbers. The steps are those of half.h.
  const DU du;
  const VU bits = hn::PromoteTo(du, half);
  const VU sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000U)));
  const VU rest = hn::And(bits, hn::Set(du, 0x7FFFU));
  const VU wide = hn::ShiftLeft<13>(rest);
  const VU smallest_normal = hn::Set(du, 0x38800000U);  // 2^-14
  const VF subnormal =
      hn::Sub(hn::BitCast(d, hn::Add(wide, smallest_normal)), hn::BitCast(d, smallest_normal));
  const DI di;  // signed comparisons: all values are below 2^31
  const auto rest_i = hn::BitCast(di, rest);
  const auto is_subnormal = hn::RebindMask(du, hn::Lt(rest_i, hn::Set(di, 0x0400)));
  const auto is_special = hn::RebindMask(du, hn::Gt(rest_i, hn::Set(di, 0x7BFF)));
  const auto is_nan = hn::RebindMask(du, hn::Gt(rest_i, hn::Set(di, 0x7C00)));
  const VU normal = hn::Add(wide, hn::Set(du, 0x38000000U));
  VU out = hn::IfThenElse(is_subnormal, hn::BitCast(du, subnormal), normal);
  out = hn::IfThenElse(is_special, hn::Or(wide, hn::Set(du, 0x7F800000U)), out);
  out = hn::Or(out, hn::IfThenElseZero(is_nan, hn::Set(du, 0x00400000U)));
  return hn::BitCast(d, hn::Or(out, sign));
#else
  const hn::Rebind<hwy::float16_t, DF> dh;
  return hn::PromoteTo(d, hn::BitCast(dh, half));
#endif
}

/// Floats to halves, to nearest even; see half.h.
HWY_INLINE VH to_half(DH d, VF x) {
#if HWY_TARGET == HWY_SSE4
  const DF df;
  const DU du;
  const DI di;
  const VU bits = hn::BitCast(du, x);
  const VU sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 0x8000U));
  const VU rest = hn::And(bits, hn::Set(du, 0x7FFFFFFFU));
  const auto rest_i = hn::BitCast(di, rest);
  const auto is_nan = hn::RebindMask(du, hn::Gt(rest_i, hn::Set(di, 0x7F800000)));
  const auto is_infinite = hn::RebindMask(du, hn::Gt(rest_i, hn::Set(di, 0x477FEFFF)));
  const auto is_subnormal = hn::RebindMask(du, hn::Lt(rest_i, hn::Set(di, 0x38800000)));
  const VU subnormal =
      hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(df, rest), hn::Set(df, 0.5F))), hn::Set(du, 0x3F000000U));
  const VU odd = hn::And(hn::ShiftRight<13>(rest), hn::Set(du, 1U));
  const VU rounded = hn::Sub(hn::Add(hn::Add(rest, hn::Set(du, 0xFFFU)), odd), hn::Set(du, 0x38000000U));
  VU out = hn::IfThenElse(is_subnormal, subnormal, hn::ShiftRight<13>(rounded));
  out = hn::IfThenElse(is_infinite, hn::Set(du, 0x7C00U), out);
  const VU payload = hn::And(hn::ShiftRight<13>(rest), hn::Set(du, 0x3FFU));
  out = hn::IfThenElse(is_nan, hn::Or(payload, hn::Set(du, 0x7E00U)), out);
  return hn::DemoteTo(d, hn::BitCast(di, hn::Or(out, sign)));
#else
  const hn::Rebind<hwy::float16_t, DF> dh;
  return hn::BitCast(d, hn::DemoteTo(dh, x));
#endif
}

/// Lanes whose bit is set, lane 0 lowest; bits beyond the lanes are 0.
HWY_INLINE hn::Mask<DF> mask_from_bits(DF d, uint32_t bits) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  (void)d;
  return hn::Mask<DF>{static_cast<decltype(hn::Mask<DF>().raw)>(bits)};
#else
  // LoadMaskBits may look at 8 bytes.
  uint8_t bytes[8] = {static_cast<uint8_t>(bits), static_cast<uint8_t>(bits >> 8)};
  return hn::LoadMaskBits(d, bytes);
#endif
}

// One vector of the second factor of a product, whatever its storage.
HWY_INLINE VF load_float(DF d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE VF load_float(DF d, const f16_t* p) { return to_float(d, hn::LoadU(DH(), p)); }
HWY_INLINE VF load_float_n(DF d, const float* p, int64_t n) { return load_n(d, p, n); }
HWY_INLINE VF load_float_n(DF d, const f16_t* p, int64_t n) { return to_float(d, load_n(DH(), p, n)); }

/// exp(x) for x <= 0: exactly 0 for x < -87.3 (the result would be subnormal, and beside the 1 of the maximum
/// it is nothing), exactly 1 for 0, NaN for NaN. Relative error below 2^-22.
///
/// x = q ln 2 + r, |r| <= ln(2)/2. Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits; with the
/// exponent bias added as well, those bits shifted into the exponent field are 2^q. The last step is a
/// product, not an integer addition to the exponent, so that NaN survives it.
HWY_INLINE VF exp_nonpositive(DF d, VF x) {
  const DU du;
  const VF magic = hn::Set(d, 12582912.0F + 127.0F);
  const VF shifted = hn::MulAdd(x, hn::Set(d, 1.44269504F), magic);
  const VF q = hn::Sub(shifted, magic);
  const VF power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, shifted)));
  // ln 2 in two parts; the first has 16 bits, so that q times it is exact.
  VF r = hn::NegMulAdd(q, hn::Set(d, 0.693145751953125F), x);
  r = hn::NegMulAdd(q, hn::Set(d, 1.428606765330187045e-6F), r);
  // exp(r) = 1 + r + r^2 (1/2 + ..): coefficients of Cephes' expf, as in most libraries.
  VF p = hn::Set(d, 1.9875691500e-4F);
  p = hn::MulAdd(p, r, hn::Set(d, 1.3981999507e-3F));
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3F));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1F));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1F));
  p = hn::MulAdd(p, hn::Mul(r, r), hn::Add(r, hn::Set(d, 1.0F)));
  // Not "if x >= -87.3 then .. else 0": that would turn NaN into 0.
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.3F)), hn::Mul(p, power));
}

/// 1 / (1 + exp(-x)), both branches by the exponential of a number below 0, which cannot overflow.
HWY_INLINE VF sigmoid(VF x) {
  const DF d;
  const VF one = hn::Set(d, 1.0F);
  const VF e = exp_nonpositive(d, hn::Neg(hn::Abs(x)));
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD

#endif  // re-inclusion guard
