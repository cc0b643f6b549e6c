// rope_rows, rope_tile: rotation by halves, pair (i, i + n_rot/2), with cos and sin from a RopeTable.
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rope.cpp"
#include <hwy/foreach_target.h>

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

struct Pair {
  VF first;
  VF second;
};

HWY_INLINE Pair rotate(VF first, VF second, VF cos, VF sin) {
  return {hn::NegMulAdd(second, sin, hn::Mul(first, cos)), hn::MulAdd(second, cos, hn::Mul(first, sin))};
}

/// By the negative angle; cos and sin carry a magnitude M, so (cos, -sin) / (cos^2 + sin^2) undoes them.
HWY_INLINE Pair unrotate(VF first, VF second, VF cos, VF sin) {
  const DF d;
  const VF inv = hn::Div(hn::Set(d, 1.0F), hn::MulAdd(cos, cos, hn::Mul(sin, sin)));
  return rotate(first, second, hn::Mul(cos, inv), hn::Neg(hn::Mul(sin, inv)));
}

template <bool kInverse>
HWY_INLINE void rows(const float* x, int64_t n_row, int64_t head_dim, int64_t n_rot, const float* cos,
                     const float* sin, int64_t ld_angle, float* y) {
  const DF d;
  const int64_t half = n_rot / 2;
  for (int64_t r = 0; r < n_row; ++r, x += head_dim, y += head_dim, cos += ld_angle, sin += ld_angle) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const VF first = hn::LoadU(d, x + i);
      const VF second = hn::LoadU(d, x + half + i);
      const VF c = hn::LoadU(d, cos + i);
      const VF s = hn::LoadU(d, sin + i);
      const Pair p = kInverse ? unrotate(first, second, c, s) : rotate(first, second, c, s);
      hn::StoreU(p.first, d, y + i);
      hn::StoreU(p.second, d, y + half + i);
    }
    if (i < half) {
      const int64_t n = half - i;
      const VF first = load_n(d, x + i, n);
      const VF second = load_n(d, x + half + i, n);
      const VF c = load_n(d, cos + i, n);
      const VF s = load_n(d, sin + i, n);
      const Pair p = kInverse ? unrotate(first, second, c, s) : rotate(first, second, c, s);
      store_n(p.first, d, y + i, n);
      store_n(p.second, d, y + half + i, n);
    }
    if (y != x && n_rot < head_dim) {
      std::memcpy(y + n_rot, x + n_rot, static_cast<size_t>(head_dim - n_rot) * sizeof(float));
    }
  }
}

}  // namespace

void rope_rows(const float* x, int64_t n_row, int64_t head_dim, int64_t n_rot, const float* cos,
               const float* sin, int64_t ld_angle, bool inverse, float* y) {
  if (inverse) {
    rows<true>(x, n_row, head_dim, n_rot, cos, sin, ld_angle, y);
  } else {
    rows<false>(x, n_row, head_dim, n_rot, cos, sin, ld_angle, y);
  }
}

void rope_tile(float* x, int64_t ld, int64_t n, int64_t /*head_dim*/, int64_t n_rot, const float* cos,
               const float* sin, int64_t ld_angle) {
  const DF d;
  const int64_t half = n_rot / 2;
  for (int64_t i = 0; i < half; ++i) {
    float* first = x + i * ld;
    float* second = x + (i + half) * ld;
    const float* c = cos + i * ld_angle;
    const float* s = sin + i * ld_angle;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      const Pair p =
          rotate(hn::LoadU(d, first + j), hn::LoadU(d, second + j), hn::LoadU(d, c + j), hn::LoadU(d, s + j));
      hn::StoreU(p.first, d, first + j);
      hn::StoreU(p.second, d, second + j);
    }
    if (j < n) {
      const int64_t m = n - j;
      const Pair p =
          rotate(load_n(d, first + j, m), load_n(d, second + j, m), load_n(d, c + j, m), load_n(d, s + j, m));
      store_n(p.first, d, first + j, m);
      store_n(p.second, d, second + j, m);
    }
  }
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
