// What lies between the products of a decode step: norm, activation, rounding of inputs to bytes. One row is
// a few thousand numbers, so every thread may do all of it for itself instead of waiting for the others.
#include <cmath>

#include "kernels/packed_weights.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/step_vectors.cpp"
#include <hwy/foreach_target.h>

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  const DF d;
  // Four chains hide the latency; the sums are short, float is enough.
  VF sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    NARROWS_UNROLL
    for (int j = 0; j < 4; ++j) {
      const VF v = hn::LoadU(d, x + i + j * kLanes);
      sum[j] = hn::MulAdd(v, v, sum[j]);
    }
  }
  for (; i < n; i += kLanes) {
    const VF v = load_n(d, x + i, n - i < kLanes ? n - i : kLanes);
    sum[0] = hn::MulAdd(v, v, sum[0]);
  }
  const VF all = hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]));
  const float mean = hn::GetLane(hn::SumOfLanes(d, all)) / static_cast<float>(n);
  const VF scale = hn::Div(hn::Set(d, 1.0F), hn::Sqrt(hn::Set(d, mean + eps)));
  for (i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    store_n(hn::Mul(hn::Mul(load_n(d, x + i, left), scale), load_n(d, weight + i, left)), d, y + i, left);
  }
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  const DF d;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    const VF g = load_n(d, gate + i, left);
    store_n(hn::Mul(hn::Mul(g, sigmoid(g)), load_n(d, up + i, left)), d, y + i, left);
  }
}

void geglu(const float* gate, const float* up, int64_t n, float* y) {
  const DF d;
  const VF linear = hn::Set(d, 1.5957691216F), cubic = hn::Set(d, 1.5957691216F * 0.044715F);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    const VF g = load_n(d, gate + i, left);
    const VF s = sigmoid(hn::Mul(g, hn::MulAdd(hn::Mul(g, g), cubic, linear)));
    store_n(hn::Mul(hn::Mul(g, s), load_n(d, up + i, left)), d, y + i, left);
  }
}

void swiglu_clamped(const float* gate, const float* up, int64_t n, float* y) {
  const DF d;
  const VF limit = hn::Set(d, 7.0F), least = hn::Set(d, -7.0F), one = hn::Set(d, 1.0F);
  // Comparisons instead of Min and Max, which lose a NaN on some targets.
  const auto at_most = [&](VF x) { return hn::IfThenElse(hn::Gt(x, limit), limit, x); };
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    const VF g = at_most(load_n(d, gate + i, left)), most = at_most(load_n(d, up + i, left));
    const VF u = hn::IfThenElse(hn::Lt(most, least), least, most);
    store_n(hn::Mul(hn::Mul(g, sigmoid(hn::Mul(g, hn::Set(d, 1.702F)))), hn::Add(u, one)), d, y + i, left);
  }
}

void sigmoid_gate(const float* gate, int64_t n, float* y) {
  const DF d;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    store_n(hn::Mul(load_n(d, y + i, left), sigmoid(load_n(d, gate + i, left))), d, y + i, left);
  }
}

namespace {

/// The largest magnitude of a group; NaN if a number is not finite (a maximum alone may lose a NaN).
HWY_INLINE float group_top(const float* x) {
  const DF d;
  VF top = hn::Zero(d), nothing = hn::Zero(d);
  NARROWS_UNROLL
  for (int64_t i = 0; i < kPackGroup; i += kLanes) {
    const VF v = hn::LoadU(d, x + i);
    top = hn::Max(top, hn::Abs(v));
    nothing = hn::MulAdd(v, hn::Zero(d), nothing);
  }
  return hn::GetLane(hn::MaxOfLanes(d, top)) + hn::GetLane(hn::SumOfLanes(d, nothing));
}

/// Codes of half a group; minus their sum.
HWY_INLINE int32_t round_half(const float* x, float inverse, int8_t* code) {
  const DF d;
  const DI di;
  const hn::Rebind<int8_t, DF> db;
  hn::Vec<DI> sum = hn::Zero(di);
  NARROWS_UNROLL
  for (int64_t i = 0; i < kPackGroup / 2; i += kLanes) {
    const auto c = hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), hn::Set(d, inverse)));
    sum = hn::Sub(sum, c);
    hn::StoreU(hn::DemoteTo(db, c), db, code + i);
  }
  return hn::GetLane(hn::SumOfLanes(di, sum));
}

}  // namespace

void round_rows(const float* x, int64_t ldx, int64_t n_row, int64_t n_in, const ByteRows& out) {
  const int64_t n_group = n_in / kPackGroup;
  for (int64_t r = 0; r < n_row; ++r) {
    for (int64_t g = 0; g < n_group; ++g) {
      const float* from = x + r * ldx + g * kPackGroup;
      const int64_t at = r * n_group + g;
      const float top = group_top(from);
      const float scale = top / 127;
      // A scale that is 0 or subnormal has no inverse in float.
      const float inverse = scale >= 0x1p-126F ? 1 / scale : 0.0F;
      int8_t* code = out.code + at * kPackGroup;
      if (std::isnan(scale)) {
        put_no_number(out, at);
        continue;
      }
      const int32_t first = round_half(from, inverse, code);
      const int32_t second = round_half(from + kPackGroup / 2, inverse, code + kPackGroup / 2);
      out.scale[at] = scale;
      out.minus[at] = first + second;
      out.minus_half[2 * at] = first;
      out.minus_half[2 * at + 1] = second;
      out.total[at] = -scale * static_cast<float>(first + second);
    }
  }
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
