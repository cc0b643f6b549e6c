// Products of a step: tiles of 16 rows of weights, as the CPU reads them, times up to 8 rows of inputs
// rounded to bytes; the sums of a group are integers, exact, as on the CPU. A block has a tile, its warps
// share the groups. Bound: the bytes of the weights, once for 8 rows of inputs. A block asks for its tile
// before the kernel that makes its inputs has ended, so that memory is busy all the time.
#include <type_traits>

#include "exec/cuda/launch.h"
#include "exec/cuda/layer_ops.h"
#include "exec/cuda/mma.cuh"
#include "exec/cuda/tiles.cuh"

namespace narrows::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kMostRows = 8;

__device__ inline int dot4(uint32_t a, uint32_t b, int sum) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}

/// One of a product's matrices, in tiles from block `first` on; its outputs begin at y.
struct Tiles {
  const uint8_t* tiles;
  const float* bias;
  float* y;
  int64_t n_out;
  int first;
};

struct Rows {
  Tiles of[device::kMostMatrices];
  int n_matrix;
  int64_t n_in, tile_bytes;
  const int8_t* code;
  const float* scale;
  int64_t ldy;
  int accumulate;
};

/// Asks for bytes of device memory, without waiting: the block's threads share them.
__device__ inline void ask_for(const uint8_t* from, int64_t bytes) {
  constexpr int kLine = 128;
  for (int64_t at = threadIdx.x * int64_t{kLine}; at < bytes; at += int64_t{32 * kWarps} * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}

#if __CUDA_ARCH__ >= 1000
#define NARROWS_BOUNDS __launch_bounds__(32 * kWarps, 1)  // left to choose, the compiler spills there
#else
#define NARROWS_BOUNDS __launch_bounds__(32 * kWarps)
#endif

template <Packing p, int N>
__global__ NARROWS_BOUNDS void multiply_tiles(const __grid_constant__ Rows a) {
  constexpr int kRecord = static_cast<int>(kernels::record_bytes(p));
  constexpr int kScales = static_cast<int>(kernels::scale_bytes(p));
  constexpr int kCodes = static_cast<int>(kernels::group_code_bytes(p));
  constexpr bool kSuper = kernels::is_super(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = lane / 8, pair = lane % 8;
  int m = 0;
  while (m + 1 < a.n_matrix && static_cast<int>(blockIdx.x) >= a.of[m + 1].first) ++m;
  const Tiles& of = a.of[m];
  const int own = static_cast<int>(blockIdx.x) - of.first;
  const uint8_t* tile = of.tiles + own * a.tile_bytes;
  let_next_begin();
  ask_for(tile, a.tile_bytes);
  after_previous();
  const int n_group = static_cast<int>(a.n_in / 32), n_unit = (n_group + 7) / 8;
  float sum[N][2] = {};
  for (int unit = warp; unit < n_unit; unit += kWarps) {
    const uint8_t* record = tile + static_cast<int64_t>(kSuper ? unit : 8 * unit) * kRecord;
    UnitScales<p> scales;
    scales.load(record, i, pair);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Lane (i, pair) has all of group g for two rows of weights, so that what belongs to a group is done
      // once.
      const int g = 4 * half + i;
      if (!kSuper && 8 * unit + g >= n_group) break;
      const uint8_t* own = kSuper ? record : record + g * kRecord;
      const uint8_t* at = kSuper ? record + kScales + g * kCodes : own + kScales;
      CodeWords w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) w[k] = load_codes<p>(at, k, pair);
      const PairScale s = scales.of(own, half, g, pair);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        const auto* code = reinterpret_cast<const uint4*>(a.code + r * a.n_in + unit * 256 + g * 32);
        const uint4 x0 = __ldg(code), x1 = __ldg(code + 1);
        const uint32_t low[4] = {x0.x, x0.z, x1.x, x1.z}, high[4] = {x0.y, x0.w, x1.y, x1.w};
        const float scale = __ldg(a.scale + static_cast<int64_t>(r) * n_group + 8 * unit + g);
        int total[2] = {};
        if constexpr (p != Packing::q8_0) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            total[0] = dot4(low[k], 0x01010101U, total[0]);
            total[1] = dot4(high[k], 0x01010101U, total[1]);
          }
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          int dot[2] = {};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            dot[0] = dot4(w[k].low[row], low[k], dot[0]);
            dot[1] = dot4(w[k].high[row], high[k], dot[1]);
          }
          if constexpr (p == Packing::q6_k) {
            sum[r][row] += scale * (s.d[row] * static_cast<float>(dot[0] - 32 * total[0]) +
                                    s.m[row] * static_cast<float>(dot[1] - 32 * total[1]));
          } else {
            sum[r][row] += scale * (s.d[row] * static_cast<float>(dot[0] + dot[1]) +
                                    s.m[row] * static_cast<float>(total[0] + total[1]));
          }
        }
      }
    }
  }
  __shared__ float parts[kWarps][N][16];
#pragma unroll
  for (int r = 0; r < N; ++r) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float x = sum[r][k];
      x += __shfl_xor_sync(~0U, x, 8);
      x += __shfl_xor_sync(~0U, x, 16);
      if (i == 0) parts[warp][r][2 * pair + k] = x;
    }
  }
  __syncthreads();
  const int64_t o = own * int64_t{16} + threadIdx.x % 16;
  const int r = threadIdx.x / 16;
  if (r >= N || o >= of.n_out) return;
  float x = of.bias != nullptr ? of.bias[o] : 0.0F;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) x += parts[w][r][threadIdx.x % 16];
  float& y = of.y[r * a.ldy + o];
  y = a.accumulate != 0 ? y + x : x;
}

template <class T>
__device__ inline float number(T x) {
  return static_cast<float>(x);
}

/// Rows of numbers: a warp an output.
template <class T>
__global__ __launch_bounds__(32 * kWarps) void multiply_rows(const T* w, const float* x, int64_t n_in,
                                                             int64_t n_out, const float* bias, float* y,
                                                             int64_t ldy, int accumulate) {
  const int64_t o = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32, r = blockIdx.y;
  let_next_begin();
  after_previous();
  if (o >= n_out) return;
  float sum = 0;
  for (int64_t i = threadIdx.x % 32; i < n_in; i += 32) sum += number(w[o * n_in + i]) * x[r * n_in + i];
#pragma unroll
  for (int k = 16; k > 0; k /= 2) sum += __shfl_xor_sync(~0U, sum, k);
  if (threadIdx.x % 32 != 0) return;
  if (bias != nullptr) sum += bias[o];
  y[r * ldy + o] = accumulate != 0 ? y[r * ldy + o] + sum : sum;
}

/// Matrices [begin, end) of one packing, whose outputs begin at column y of a row.
template <Packing p>
void launch_tiles(const device::MultiplyArgs& a, int begin, int end, float* y, cudaStream_t stream) {
  Rows rows{};
  rows.n_in = a.w[begin].n_in;
  rows.tile_bytes = kernels::tile_bytes(p, rows.n_in);
  rows.ldy = a.ldy;
  rows.accumulate = a.accumulate;
  int64_t blocks = 0;
  for (int k = begin; k < end; ++k) {
    rows.of[rows.n_matrix++] = {static_cast<const uint8_t*>(a.w[k].data), a.bias[k], y, a.w[k].n_out,
                                static_cast<int>(blocks)};
    blocks += kernels::pack_tiles(a.w[k].n_out);
    y += a.w[k].n_out;
  }
  int64_t first = 0;
  const auto go = [&](auto kernel, int64_t n) {
    rows.code = a.code + first * rows.n_in;
    rows.scale = a.scale + first * (rows.n_in / 32);
    launch_early(kernel, dim3(static_cast<unsigned>(blocks)), 32 * kWarps, 0, stream, rows);
    for (int k = 0; k < rows.n_matrix; ++k) rows.of[k].y += n * a.ldy;
    first += n;
  };
  while (first < a.n) {
    const int64_t left = a.n - first;
    // Sums of a row are in one order whatever the number of rows.
    if (left >= kMostRows) {
      go(multiply_tiles<p, 8>, 8);
    } else if (left >= 4) {
      go(multiply_tiles<p, 4>, 4);
    } else if (left >= 2) {
      go(multiply_tiles<p, 2>, 2);
    } else {
      go(multiply_tiles<p, 1>, 1);
    }
  }
}

template <class T>
void launch_rows(const device::MultiplyArgs& a, int k, float* y, cudaStream_t stream) {
  const device::Weights& w = a.w[k];
  const dim3 grid(static_cast<unsigned>((w.n_out + kWarps - 1) / kWarps), static_cast<unsigned>(a.n));
  launch_early(multiply_rows<T>, grid, 32 * kWarps, 0, stream, static_cast<const T*>(w.data), a.f32, w.n_in,
               w.n_out, a.bias[k], y, a.ldy, a.accumulate);
}

/// A tile of weights as bf16 rows: a warp a group.
template <Packing p>
__global__ __launch_bounds__(32 * kWarps) void unpack_tiles(const uint8_t* tiles, int64_t n_in, int64_t n_out,
                                                            int64_t tile_bytes, __nv_bfloat16* out) {
  constexpr int kGroups = static_cast<int>(kernels::inputs_at_once(p) / kernels::kPackGroup);
  constexpr int kRecord = static_cast<int>(kernels::record_bytes(p));
  const int lane = threadIdx.x % 32, i = lane / 8, pair = lane % 8;
  const int g = blockIdx.y * kWarps + threadIdx.x / 32;
  if (g >= n_in / 32) return;
  const uint8_t* record = tiles + blockIdx.x * tile_bytes + static_cast<int64_t>(g / kGroups) * kRecord;
  const CodeWords w =
      load_codes<p>(record + kernels::scale_bytes(p) + g % kGroups * kernels::group_code_bytes(p), i, pair);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int64_t o = blockIdx.x * int64_t{16} + 2 * pair + k;
    if (o >= n_out) continue;
    const RowScale s = load_scale<p>(record, g % kGroups, 2 * pair + k);
    const auto four = [&](uint32_t word, int half) {
      float x[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t byte = word >> 8 * t & 255U;
        const float code =
            p == Packing::q8_0 ? static_cast<float>(static_cast<int8_t>(byte)) : static_cast<float>(byte);
        x[t] = s.d[half] * code + s.m[half];
      }
      return make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
    };
    __nv_bfloat16* to = out + o * n_in + g * int64_t{32} + 4 * i;
    *reinterpret_cast<uint2*>(to) = four(w.low[k], 0);
    *reinterpret_cast<uint2*>(to + 16) = four(w.high[k], 1);
  }
}

template <class T>
__global__ __launch_bounds__(256) void unpack_rows(const T* w, int64_t n, __nv_bfloat16* out) {
  const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x;
  if (i < n) out[i] = __float2bfloat16_rn(number(w[i]));
}

template <class T>
void unpack_numbers(const device::Weights& w, void* bf16, cudaStream_t stream) {
  const int64_t n = w.n_in * w.n_out;
  unpack_rows<<<static_cast<unsigned>((n + 255) / 256), 256, 0, stream>>>(static_cast<const T*>(w.data), n,
                                                                          static_cast<__nv_bfloat16*>(bf16));
}

}  // namespace

bool launch_multiply(const device::MultiplyArgs& a, cudaStream_t stream) {
  const int n = static_cast<int>(a.n_matrix);
  float* y = a.y;
  for (int begin = 0, end = 0; begin < n; begin = end) {
    // Neighbours of one form are one launch.
    const int32_t form = a.w[begin].form;
    end = begin + 1;
    while (end < n && form < device::kRowsF32 && a.w[end].form == form) ++end;
    bool known = true;
    switch (form) {
      case device::kRowsF32:
        launch_rows<float>(a, begin, y, stream);
        break;
      case device::kRowsF16:
        launch_rows<__half>(a, begin, y, stream);
        break;
      case device::kRowsBf16:
        launch_rows<__nv_bfloat16>(a, begin, y, stream);
        break;
      default:
        known =
            with_packing(form, [&](auto p) { launch_tiles<decltype(p)::value>(a, begin, end, y, stream); });
    }
    if (!known) return false;
    for (int k = begin; k < end; ++k) y += a.w[k].n_out;
  }
  return true;
}

bool launch_unpack(const device::Weights& w, void* bf16, cudaStream_t stream) {
  switch (w.form) {
    case device::kRowsF32:
      unpack_numbers<float>(w, bf16, stream);
      return true;
    case device::kRowsF16:
      unpack_numbers<__half>(w, bf16, stream);
      return true;
    case device::kRowsBf16:
      unpack_numbers<__nv_bfloat16>(w, bf16, stream);
      return true;
    default:
      return with_packing(w.form, [&](auto p) {
        constexpr Packing kPacking = decltype(p)::value;
        const dim3 grid(static_cast<unsigned>(kernels::pack_tiles(w.n_out)),
                        static_cast<unsigned>((w.n_in / 32 + kWarps - 1) / kWarps));
        unpack_tiles<kPacking><<<grid, 32 * kWarps, 0, stream>>>(
            static_cast<const uint8_t*>(w.data), w.n_in, w.n_out, kernels::tile_bytes(kPacking, w.n_in),
            static_cast<__nv_bfloat16*>(bf16));
      });
  }
}

}  // namespace narrows::cuda
