// One warp attends with up to 8 query heads of a KV head to tiles of 16 tokens: S^T = K q^T, O^T += V^T P^T,
// so that the query heads are the 8 columns of a product and rows of keys and values come straight from
// device memory.
#pragma once

#include "exec/cuda/mma.cuh"

namespace narrows::cuda {

/// Query heads a warp attends with.
inline constexpr int kHeadsOfTile = 8;

/// Softmax of columns 2 c and 2 c + 1 (query heads), in base 2: max over all rows, l of this lane's rows
/// alone. o: m-tile i has coordinate 64 (i / 4) + 8 g + 2 (i % 4) in its row g and the next one in row g + 8.
template <int HD>
struct FlashState {
  float m[2] = {-INFINITY, -INFINITY};
  float l[2] = {0, 0};
  float o[HD / 16][4] = {};
};

/// Fragments of q as the second factor: q f16 [n_head, HD] of a group, rows from n_head on are zeros.
template <int HD>
struct QueryFragments {
  uint4 b[HD / 32];
  __device__ void load(const __half* q, int n_head) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int j = 0; j < HD / 32; ++j) {
      b[j] = make_uint4(0, 0, 0, 0);
      if (g < n_head) b[j] = *reinterpret_cast<const uint4*>(q + g * HD + (4 * j + c) * 8);
    }
  }
};

/// Products of 16 rows of keys with the queries: k0, k1 are the rows of tokens g and g + 8 (read if has0,
/// has1).
template <int HD>
__device__ inline void score_tile(const QueryFragments<HD>& q, const __half* k0, const __half* k1, bool has0,
                                  bool has1, float (&s)[4]) {
  const int c = threadIdx.x % 4;
  uint4 x[HD / 32], y[HD / 32];
#pragma unroll
  for (int j = 0; j < HD / 32; ++j) {
    x[j] = y[j] = make_uint4(0, 0, 0, 0);
    if (has0) x[j] = load_once(k0 + (4 * j + c) * 8);
    if (has1) y[j] = load_once(k1 + (4 * j + c) * 8);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = 0;
#pragma unroll
  for (int j = 0; j < HD / 32; ++j) {
    mma_f16(s, x[j].x, y[j].x, x[j].y, y[j].y, q.b[j].x, q.b[j].y);
    mma_f16(s, x[j].z, y[j].z, x[j].w, y[j].w, q.b[j].z, q.b[j].w);
  }
}

/// The values of four tokens, rows 2 c, 2 c + 1, 2 c + 8, 2 c + 9 of a tile.
template <int HD>
struct ValueRows {
  uint4 v[HD / 64][4];
  __device__ void load(const __half* const (&rows)[4], const bool (&has)[4]) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < HD / 64; ++h) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        v[h][r] = make_uint4(0, 0, 0, 0);
        if (has[r]) v[h][r] = load_once(rows[r] + h * 64 + g * 8);
      }
    }
  }
};

__device__ inline uint32_t word_of(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

/// Adds a tile whose scores (already in base 2, -inf where there is no token) are s.
template <int HD>
__device__ inline void add_tile(FlashState<HD>& state, const float (&s)[4], const ValueRows<HD>& rows) {
  float p[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float top = fmaxf(state.m[i], max_rows(fmaxf(s[i], s[i + 2])));
    const float base = top == -INFINITY ? 0.0F : top;
    const float keep = power2(state.m[i] - base);
    p[i] = power2(s[i] - base);
    p[i + 2] = power2(s[i + 2] - base);
    state.l[i] = state.l[i] * keep + p[i] + p[i + 2];
    state.m[i] = top;
#pragma unroll
    for (int t = 0; t < HD / 16; ++t) {
      state.o[t][i] *= keep;
      state.o[t][i + 2] *= keep;
    }
  }
  const uint32_t b0 = transpose8(pack_half(p[0], p[1])), b1 = transpose8(pack_half(p[2], p[3]));
#pragma unroll
  for (int h = 0; h < HD / 64; ++h) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t x = word_of(rows.v[h][0], i), y = word_of(rows.v[h][1], i);
      const uint32_t z = word_of(rows.v[h][2], i), w = word_of(rows.v[h][3], i);
      mma_f16(state.o[h * 4 + i], __byte_perm(x, y, 0x5410), __byte_perm(x, y, 0x7632),
              __byte_perm(z, w, 0x5410), __byte_perm(z, w, 0x7632), b0, b1);
    }
  }
}

/// Attends to tokens [first, last) of a tile in consecutive rows k, v [16, HD]; scale2 is scale * log2(e).
template <int HD>
__device__ inline void attend_tile(FlashState<HD>& state, const QueryFragments<HD>& q, const __half* k,
                                   const __half* v, int first, int last, float scale2) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const auto in = [&](int t) { return t >= first && t < last; };
  const __half* const rows[4] = {v + (2 * c) * HD, v + (2 * c + 1) * HD, v + (2 * c + 8) * HD,
                                 v + (2 * c + 9) * HD};
  const bool has[4] = {in(2 * c), in(2 * c + 1), in(2 * c + 8), in(2 * c + 9)};
  ValueRows<HD> values;
  values.load(rows, has);
  float s[4];
  score_tile<HD>(q, k + g * HD, k + (g + 8) * HD, in(g), in(g + 8), s);
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = in(g + i / 2 * 8) ? s[i] * scale2 : -INFINITY;
  add_tile<HD>(state, s, values);
}

/// A softmax state of one query head in memory: max, sum, then HD sums. In base 2.
template <int HD>
struct StateRow {
  float m, l;
  float pad[2];
  float o[HD];
};

/// Writes a warp's state to rows [8] of shared or device memory.
template <int HD>
__device__ inline void write_state(FlashState<HD>& state, StateRow<HD>* rows, int n_head) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state.l[i] = sum_rows(state.l[i]);
    const int head = 2 * c + i;
    if (head >= n_head) continue;
    if (g == 0) {
      rows[head].m = state.m[i];
      rows[head].l = state.l[i];
    }
#pragma unroll
    for (int t = 0; t < HD / 16; ++t) {
      const int at = t / 4 * 64 + 8 * g + 2 * (t % 4);
      *reinterpret_cast<float2*>(&rows[head].o[at]) = make_float2(state.o[t][i], state.o[t][i + 2]);
    }
  }
}

}  // namespace narrows::cuda
