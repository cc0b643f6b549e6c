// Half <-> float for whole arrays, x [n] -> y [n]; the conversions themselves are in simd-inl.h.
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/convert.cpp"
#include <hwy/foreach_target.h>

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

void f32_to_f16(const float* x, f16_t* y, int64_t n) {
  const DF df;
  const DH dh;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(to_half(dh, hn::LoadU(df, x + i)), dh, y + i);
  if (i < n) store_n(to_half(dh, load_n(df, x + i, n - i)), dh, y + i, n - i);
}

void f16_to_f32(const f16_t* x, float* y, int64_t n) {
  const DF df;
  const DH dh;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(to_float(df, hn::LoadU(dh, x + i)), df, y + i);
  if (i < n) store_n(to_float(df, load_n(dh, x + i, n - i)), df, y + i, n - i);
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
