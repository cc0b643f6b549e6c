// One row of an online softmax step over a tile, of attend.

// clang-format off
#if defined(NARROWS_KERNELS_SOFTMAX_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NARROWS_KERNELS_SOFTMAX_INL_H
#undef NARROWS_KERNELS_SOFTMAX_INL_H
#else
#define NARROWS_KERNELS_SOFTMAX_INL_H
#endif
// clang-format on

#include <cmath>
#include <limits>

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// Turns the scores s [kTile] of a row into weights exp(s - max) in place, after raising max to cover them;
/// adds the weights to sum [lanes]. Masked columns hold -infinity and get exactly 0. Returns the factor that
/// what was summed before must be multiplied with (sum already is): 1 unless the maximum moved, 0 if there
/// was nothing before.
HWY_INLINE float softmax_step(float* HWY_RESTRICT s, float& max, VF& sum) {
  const DF d;
  VF top_lane = hn::LoadU(d, s);
  NARROWS_UNROLL
  for (int64_t j = kLanes; j < kTile; j += kLanes) top_lane = hn::Max(top_lane, hn::LoadU(d, s + j));
  float keep = 1;
  // Most tiles of a long row do not raise its maximum, and then no reduction across lanes is needed.
  if (!hn::AllFalse(d, hn::Gt(top_lane, hn::Set(d, max)))) {
    const float top = hn::GetLane(hn::MaxOfLanes(d, top_lane));
    keep = max == kMinusInfinity ? 0.0F : std::exp(max - top);
    max = top;
    sum = hn::Mul(sum, hn::Set(d, keep));
  }
  // All scores so far -infinity: any finite number subtracted leaves them so, -infinity would make NaN.
  const VF shift = hn::Set(d, max == kMinusInfinity ? 0.0F : max);
  NARROWS_UNROLL
  for (int64_t j = 0; j < kTile; j += kLanes) {
    const VF weight = exp_nonpositive(d, hn::Sub(hn::LoadU(d, s + j), shift));
    sum = hn::Add(sum, weight);
    hn::StoreU(weight, d, s + j);
  }
  return keep;
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD

#endif  // re-inclusion guard
