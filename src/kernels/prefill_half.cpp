// Half precision as a matrix unit computes it that sums kHalfChunk products in float32 and keeps its
// accumulator in half. Emulated in float registers, so that any CPU shows what the formats do; speed is not
// the aim.
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/prefill_half.cpp"
#include <hwy/foreach_target.h>

#include "kernels/prefill_half-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

struct MatrixUnit {
  using Word = float;  ///< that is a half
  using Vector = VF;
  static constexpr int kPer = 1;

  static float word(float x, float /*the same*/) { return round_to_half(x); }
  static HWY_INLINE VF load(const float* p) { return hn::Load(DF(), p); }
  static HWY_INLINE void store(VF x, float* to) { hn::Store(x, DF(), to); }
  static HWY_INLINE VF multiply_add(VF sum, VF b, const float* a) {
    return hn::MulAdd(hn::Set(DF(), *a), b, sum);
  }

  template <PrefillKind, HalfSum>
  static HWY_INLINE void product(int64_t n, const float* a, const float* b, VF (&acc)[kRows][kVectors]) {
    set_zero(acc);
    for (int64_t p = 0; p < n; p += kHalfChunk) {
      VF part[kRows][kVectors];
      set_zero(part);
      multiply<MatrixUnit>(std::min(kHalfChunk, n - p), a + p * kRows, b + p * kQueryLanes, part);
      NARROWS_UNROLL
      for (int i = 0; i < kRows; ++i) {
        NARROWS_UNROLL
        for (int j = 0; j < kVectors; ++j) acc[i][j] = round_half(hn::Add(acc[i][j], part[i][j]));
      }
    }
  }
};

}  // namespace

constinit const PrefillKernel kPrefillFp16 = kHalfKernel<MatrixUnit, PrefillKind::fp16>;
constinit const PrefillKernel kPrefillPasa = kHalfKernel<MatrixUnit, PrefillKind::pasa>;
constinit const PrefillKernel kPrefillFp16Shift = kHalfKernel<MatrixUnit, PrefillKind::fp16_shift>;

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
