// Half precision as a CPU with half arithmetic computes it: every product is added to a sum of halves and
// that sum is rounded. ARMv8.2-FP16 and AVX512-FP16, and once more emulated: what the two compute can be
// tested, and measured on models (NARROWS_FORCE_TARGET=FP16_EMULATED), where no CPU has it.
//
// fp16 and pasa keep one sum of halves a product, as their formats say. fp16_shift adds up a few products in
// half (kNativeScores, kNativeValues) and these sums in float32.
//
// Only the products are native: the rest is the same code, in float registers (prefill_half-inl.h).
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/prefill_half_native.cpp"
#include <hwy/foreach_target.h>

#include "kernels/prefill_half-inl.h"

#if NARROWS_NATIVE_HALF
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

using DN = hn::Repartition<uint16_t, DF>;  ///< whole vectors of halves, as bits
using VN = hn::Vec<DN>;

/// Of the block that flash-inl.h chose for floats: as many queries, half as many vectors.
inline constexpr int kHalfVectors = kVectors / 2;
inline constexpr int64_t kHalfLanes = 2 * kLanes;
static_assert(kHalfVectors * kHalfLanes == kQueryLanes);
static_assert(kRows % kNativeScores == 0);  // so there is no shorter chunk of scores

// The thin layer below everything: a vector of kHalfLanes halves. step() is sum [kRows][kHalfVectors] += a
// [kRows] (broadcast) * column, rounded once, to nearest even.
//
// Assembly because Highway 1.0.3 has no word for these instructions and its targets do not promise them: the
// tables that use them are offered only where the CPU has them (dispatch.cpp).

#if HWY_TARGET == HWY_NEON || HWY_TARGET == HWY_AVX3_DL
struct HalfVector {
  VN raw;

  static HWY_INLINE HalfVector zero() { return {hn::Zero(DN())}; }
  static HWY_INLINE HalfVector load(const f16_t* p) { return {hn::Load(DN(), p)}; }
  HWY_INLINE VF low() const { return to_float(DF(), hn::LowerHalf(DH(), raw)); }
  HWY_INLINE VF high() const { return to_float(DF(), hn::UpperHalf(DH(), raw)); }

#if HWY_TARGET == HWY_AVX3_DL
  static HWY_INLINE void step(const f16_t* a, const HalfVector (&column)[kHalfVectors],
                              HalfVector (&sum)[kRows][kHalfVectors]) {
    NARROWS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      NARROWS_UNROLL
      for (int j = 0; j < kHalfVectors; ++j) {
        asm("vfmadd231ph %2%{1to32%}, %1, %0" : "+v"(sum[i][j].raw.raw) : "v"(column[j].raw.raw), "m"(a[i]));
      }
    }
  }
#else
  template <int kRow>
  static HWY_INLINE void row(uint16x4_t a, const HalfVector (&column)[kHalfVectors],
                             HalfVector (&sum)[kRows][kHalfVectors]) {
    NARROWS_UNROLL
    for (int j = 0; j < kHalfVectors; ++j) {
      asm(".arch_extension fp16\n\tfmla %0.8h, %1.8h, %2.h[%3]"
          : "+w"(sum[kRow][j].raw.raw)
          : "w"(column[j].raw.raw), "x"(a), "i"(kRow));
    }
  }
  static HWY_INLINE void step(const f16_t* a, const HalfVector (&column)[kHalfVectors],
                              HalfVector (&sum)[kRows][kHalfVectors]) {
    static_assert(kRows == 4);
    const uint16x4_t rows = vld1_u16(a);
    row<0>(rows, column, sum);
    row<1>(rows, column, sum);
    row<2>(rows, column, sum);
    row<3>(rows, column, sum);
  }
#endif
};
#else
/// a b + c rounded to half ONCE, in floats: the product of halves is exact, and of the sum what rounding left
/// over is known (Knuth's two-sum). Made odd where something is left over, it has no false ties.
HWY_INLINE VF half_multiply_add(VF a, VF b, VF c) {
  const DF d;
  const DI di;
  const VF product = hn::Mul(a, b), sum = hn::Add(product, c);
  const VF added = hn::Sub(sum, c);
  const VF left = hn::Add(hn::Sub(c, hn::Sub(sum, added)), hn::Sub(product, added));
  const auto bits = hn::BitCast(di, sum), one = hn::Set(di, 1);
  const auto inexact = hn::RebindMask(di, hn::Gt(hn::Abs(left), hn::Zero(d)));  // not where NaN
  const auto even = hn::Eq(hn::And(bits, one), hn::Zero(di));
  const auto inwards = hn::Lt(hn::Xor(bits, hn::BitCast(di, left)), hn::Zero(di));
  const auto step = hn::IfThenElse(inwards, hn::Set(di, -1), one);
  const auto odd = hn::Add(bits, hn::IfThenElseZero(hn::And(inexact, even), step));
  return round_half(hn::BitCast(d, odd));
}

/// The same in floats.
struct HalfVector {
  VF lower, upper;

  static HWY_INLINE HalfVector zero() { return {hn::Zero(DF()), hn::Zero(DF())}; }
  static HWY_INLINE HalfVector load(const f16_t* p) {
    return {to_float(DF(), hn::Load(DH(), p)), to_float(DF(), hn::Load(DH(), p + kLanes))};
  }
  HWY_INLINE VF low() const { return lower; }
  HWY_INLINE VF high() const { return upper; }
  static HWY_INLINE void step(const f16_t* a, const HalfVector (&column)[kHalfVectors],
                              HalfVector (&sum)[kRows][kHalfVectors]) {
    for (int i = 0; i < kRows; ++i) {
      const VF factor = hn::Set(DF(), half_to_float(a[i]));
      for (int j = 0; j < kHalfVectors; ++j) {
        sum[i][j].lower = half_multiply_add(factor, column[j].lower, sum[i][j].lower);
        sum[i][j].upper = half_multiply_add(factor, column[j].upper, sum[i][j].upper);
      }
    }
  }
};
#endif

struct HalfArithmetic {
  using Word = f16_t;
  static constexpr int kPer = 1;

  static f16_t word(float x, float /*the same*/) { return float_to_half(x); }
  static HWY_INLINE void store(VF x, f16_t* to) { hn::Store(to_half(DH(), x), DH(), to); }

  template <PrefillKind kKind, HalfSum kSum>
  static HWY_INLINE void product(int64_t n, const f16_t* a, const f16_t* b, VF (&acc)[kRows][kVectors]) {
    constexpr bool kScores = kSum == HalfSum::scores;
    const int64_t chunk = kKind != PrefillKind::fp16_shift ? n : kScores ? kNativeScores : kNativeValues;
    set_zero(acc);
    for (int64_t p = 0; p < n; p += chunk) {
      HalfVector sum[kRows][kHalfVectors];
      NARROWS_UNROLL
      for (int i = 0; i < kRows; ++i) {
        NARROWS_UNROLL
        for (int j = 0; j < kHalfVectors; ++j) sum[i][j] = HalfVector::zero();
      }
      const int64_t end = kScores ? p + chunk : std::min(p + chunk, n);
      NARROWS_UNROLL_STEPS
      for (int64_t step = p; step < end; ++step) {
        HalfVector column[kHalfVectors];
        NARROWS_UNROLL
        for (int j = 0; j < kHalfVectors; ++j)
          column[j] = HalfVector::load(b + step * kQueryLanes + j * kHalfLanes);
        HalfVector::step(a + step * kRows, column, sum);
      }
      NARROWS_UNROLL
      for (int i = 0; i < kRows; ++i) {
        NARROWS_UNROLL
        for (int j = 0; j < kHalfVectors; ++j) {
          acc[i][2 * j] = hn::Add(acc[i][2 * j], sum[i][j].low());
          acc[i][2 * j + 1] = hn::Add(acc[i][2 * j + 1], sum[i][j].high());
        }
      }
    }
  }
};

}  // namespace

constinit const PrefillKernel kPrefillFp16Native = kHalfKernel<HalfArithmetic, PrefillKind::fp16>;
constinit const PrefillKernel kPrefillPasaNative = kHalfKernel<HalfArithmetic, PrefillKind::pasa>;
constinit const PrefillKernel kPrefillFp16ShiftNative = kHalfKernel<HalfArithmetic, PrefillKind::fp16_shift>;

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_NATIVE_HALF
