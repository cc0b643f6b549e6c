// Prefill attention in float32: the fastest accurate one on CPUs that do not multiply bfloat16.
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/prefill_f32.cpp"
#include <hwy/foreach_target.h>

#include "kernels/flash-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

struct FloatWords {
  using Word = float;
  using Vector = VF;
  static constexpr int kPer = 1;

  static float word(float x, float /*the same*/) { return x; }
  static HWY_INLINE VF load(const float* p) { return hn::Load(DF(), p); }
  static HWY_INLINE VF multiply_add(VF sum, VF b, const float* a) {
    return hn::MulAdd(hn::Set(DF(), *a), b, sum);
  }
  static HWY_INLINE void weight(VF score, VF /*the same*/, float* to, VF& sum) {
    const VF w = exp2_any<6>(DF(), score);
    sum = hn::Add(sum, w);
    hn::Store(w, DF(), to);
  }
};

}  // namespace

constinit const PrefillKernel kPrefillF32 = kFlashKernel<FloatWords, false>;

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
