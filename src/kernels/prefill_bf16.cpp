// Prefill attention in bfloat16, sums in float32, with and without the shift of keys by the mean of their
// tile (docs/half_precision.md). On CPUs with AVX512-BF16 by their products of pairs; elsewhere the operands
// are rounded and multiplied as floats, which says what the format costs, not how fast it is.
#include "kernels/bf16.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/prefill_bf16.cpp"
#include <hwy/foreach_target.h>

#include "kernels/flash-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

/// The sum of a row's weights is that of the ROUNDED weights: so the roundings of a row cancel in as far as
/// its values agree.
struct RoundedFloats {
  using Word = float;
  using Vector = VF;
  static constexpr int kPer = 1;

  static float word(float x, float /*the same*/) { return round_to_bf16(x); }
  static HWY_INLINE VF load(const float* p) { return hn::Load(DF(), p); }
  static HWY_INLINE VF multiply_add(VF sum, VF b, const float* a) {
    return hn::MulAdd(hn::Set(DF(), *a), b, sum);
  }
  static HWY_INLINE void weight(VF score, VF /*the same*/, float* to, VF& sum) {
    const DU du;
    const VF w = exp2_any<3>(DF(), score);
    const VU bits = hn::BitCast(du, w);
    const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1U));
    const VU rounded = hn::And(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFFU))), hn::Set(du, 0xFFFF0000U));
    // The addition could carry a NaN into the sign.
    const VF result = hn::IfThenElse(hn::Eq(w, w), hn::BitCast(DF(), rounded), w);
    sum = hn::Add(sum, result);
    hn::Store(result, DF(), to);
  }
};

#if HWY_TARGET == HWY_AVX3_DL
/// Highway 1.0.3 has no word for these instructions, and its target does not promise them: the table that
/// uses them is offered only where the CPU has them (dispatch.cpp).
struct Bf16Pairs {
  using Word = uint32_t;
  using Vector = VU;
  static constexpr int kPer = 2;

  static uint32_t word(float low, float high) {
    return float_to_bf16(low) | uint32_t{float_to_bf16(high)} << 16;
  }
  static HWY_INLINE VU load(const uint32_t* p) { return hn::Load(DU(), p); }
  static HWY_INLINE VF multiply_add(VF sum, VU b, const uint32_t* a) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(b.raw), "m"(*a));
    return sum;
  }
  static HWY_INLINE void weight(VF even, VF odd, uint32_t* to, VF& sum) {
    const DF d;
    const __m512 low = exp2_any<3>(d, even).raw, high = exp2_any<3>(d, odd).raw;
    __m512i pairs;  // 16 of `low`, then 16 of `high`
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(low), "v"(high));
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    pairs = _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), pairs);
    const __m512i ones = _mm512_set1_epi32(0x3F803F80);
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(pairs), "v"(ones));
    hn::Store(VU{pairs}, DU(), to);
  }
};
#endif

}  // namespace

constinit const PrefillKernel kPrefillBf16 = kFlashKernel<RoundedFloats, false>;
constinit const PrefillKernel kPrefillBf16Shift = kFlashKernel<RoundedFloats, true>;
#if HWY_TARGET == HWY_AVX3_DL
constinit const PrefillKernel kPrefillBf16Native = kFlashKernel<Bf16Pairs, false>;
constinit const PrefillKernel kPrefillBf16ShiftNative = kFlashKernel<Bf16Pairs, true>;
#endif

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
