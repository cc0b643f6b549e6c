// quant_groups, dequant_groups: asymmetric groups of kGroup values, 2 or 4 bits a code (KIVI,
// arXiv:2402.02750). Value i of a group is in byte i % w, so that a vector of bytes, shifted, is a vector of
// consecutive values:
//
//   bits 4, w 16:  byte 0 = values 0, 16;          byte 1 = values 1, 17;         ..
//   bits 2, w  8:  byte 0 = values 0, 8, 16, 24;   byte 1 = values 1, 9, 17, 25;  ..
//
// The rule and the short last group are those of ref/groups.cpp, to the bit.
#include "kernels/half.h"
#include "kernels/ref/ref.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/groups.cpp"
#include <hwy/foreach_target.h>

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

template <int kBits>
inline constexpr int64_t kWidth = kGroup* kBits / 8;  ///< bytes of a group

/// As many lanes as fit the bytes of a group, at most a vector.
template <int kBits>
using GroupTag = hn::CappedTag<float, static_cast<size_t>(kWidth<kBits>)>;

template <int kBits>
HWY_INLINE void dequant_group(const uint8_t* code, float scale, float zero, float* y) {
  const GroupTag<kBits> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<uint8_t, decltype(d)> db;
  constexpr int64_t kStep = static_cast<int64_t>(hn::MaxLanes(GroupTag<kBits>()));
  const auto scale_v = hn::Set(d, scale);
  const auto zero_v = hn::Set(d, zero);
  const auto mask = hn::Set(di, (1 << kBits) - 1);
  NARROWS_UNROLL
  for (int64_t b = 0; b < kWidth<kBits>; b += kStep) {
    auto bytes = hn::PromoteTo(di, hn::LoadU(db, code + b));
    NARROWS_UNROLL
    for (int64_t i = b; i < kGroup; i += kWidth<kBits>) {
      const auto c = hn::ConvertTo(d, hn::And(bytes, mask));
      hn::StoreU(hn::MulAdd(c, scale_v, zero_v), d, y + i);
      bytes = hn::ShiftRight<kBits>(bytes);
    }
  }
}

template <int kBits>
HWY_INLINE void dequant(const uint8_t* codes, const f16_t* params, int64_t n, float* y) {
  constexpr int64_t kBatch = 32;  // groups whose parameters are converted at once
  const DF df;
  HWY_ALIGN float param[2 * kBatch];
  const int64_t n_group = n / kGroup;
  for (int64_t g0 = 0; g0 < n_group; g0 += kBatch) {
    const int64_t batch = n_group - g0 < kBatch ? n_group - g0 : kBatch;
    int64_t i = 0;
    for (; i + kLanes <= 2 * batch; i += kLanes) {
      hn::Store(to_float(df, hn::LoadU(DH(), params + 2 * g0 + i)), df, param + i);
    }
    if (i < 2 * batch)
      hn::Store(to_float(df, load_n(DH(), params + 2 * g0 + i, 2 * batch - i)), df, param + i);
    for (int64_t g = 0; g < batch; ++g) {
      dequant_group<kBits>(codes + (g0 + g) * kWidth<kBits>, param[2 * g], param[2 * g + 1],
                           y + (g0 + g) * kGroup);
    }
  }
  const int64_t done = n_group * kGroup;
  if (done < n) {
    ref::dequant_groups(codes + n_group * kWidth<kBits>, params + 2 * n_group, n - done, kBits, y + done);
  }
}

/// Range of a whole group; false if a value is NaN or beyond f16.
HWY_INLINE bool group_range(const float* x, float& low, float& high) {
  const DF d;
  const VF limit = hn::Set(d, kHalfMax);
  VF v = hn::LoadU(d, x);
  auto fits = hn::Le(hn::Abs(v), limit);
  VF low_lane = v;
  VF high_lane = v;
  NARROWS_UNROLL
  for (int64_t i = kLanes; i < kGroup; i += kLanes) {
    v = hn::LoadU(d, x + i);
    fits = hn::And(fits, hn::Le(hn::Abs(v), limit));
    low_lane = hn::Min(low_lane, v);
    high_lane = hn::Max(high_lane, v);
  }
  low = hn::GetLane(hn::MinOfLanes(d, low_lane)) + 0.0F;  // -0 becomes +0, as in ref/
  high = hn::GetLane(hn::MaxOfLanes(d, high_lane)) + 0.0F;
  return hn::AllTrue(d, fits);
}

template <int kBits>
HWY_INLINE bool quant_group(const float* x, uint8_t* code, f16_t* param) {
  const GroupTag<kBits> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<uint8_t, decltype(d)> db;
  constexpr int64_t kStep = static_cast<int64_t>(hn::MaxLanes(GroupTag<kBits>()));
  constexpr int kTop = (1 << kBits) - 1;
  float low = 0;
  float high = 0;
  if (!group_range(x, low, high)) return false;
  param[0] = float_to_half((high - low) / static_cast<float>(kTop));
  param[1] = float_to_half(low);
  const float scale = half_to_float(param[0]);
  if (scale == 0) {
    std::memset(code, 0, static_cast<size_t>(kWidth<kBits>));
    return true;
  }
  const auto scale_v = hn::Set(d, scale);
  const auto zero_v = hn::Set(d, half_to_float(param[1]));
  // The quotient fits int32: f16 rounds zero by at most 16, and the smallest scale is 2^-24.
  for (int64_t b = 0; b < kWidth<kBits>; b += kStep) {
    auto packed = hn::Zero(di);
    NARROWS_UNROLL
    for (int part = 8 / kBits - 1; part >= 0; --part) {
      const auto v = hn::LoadU(d, x + part * kWidth<kBits> + b);
      const auto nearest = hn::NearestInt(hn::Div(hn::Sub(v, zero_v), scale_v));
      const auto c = hn::Min(hn::Max(nearest, hn::Zero(di)), hn::Set(di, kTop));
      packed = hn::Or(hn::ShiftLeft<kBits>(packed), c);
    }
    hn::StoreU(hn::DemoteTo(db, packed), db, code + b);
  }
  return true;
}

template <int kBits>
HWY_INLINE bool quant(const float* x, int64_t n, uint8_t* codes, f16_t* params) {
  const int64_t n_group = n / kGroup;
  for (int64_t g = 0; g < n_group; ++g) {
    if (!quant_group<kBits>(x + g * kGroup, codes + g * kWidth<kBits>, params + 2 * g)) return false;
  }
  const int64_t done = n_group * kGroup;
  return done == n ||
         ref::quant_groups(x + done, n - done, kBits, codes + n_group * kWidth<kBits>, params + 2 * n_group);
}

}  // namespace

void dequant_groups(const uint8_t* codes, const f16_t* params, int64_t n, int bits, float* y) {
  if (bits == 4) {
    dequant<4>(codes, params, n, y);
  } else {
    dequant<2>(codes, params, n, y);
  }
}

bool quant_groups(const float* x, int64_t n, int bits, uint8_t* codes, f16_t* params) {
  return bits == 4 ? quant<4>(x, n, codes, params) : quant<2>(x, n, codes, params);
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
