// Products of a step: tiles of 16 rows of weights, as the CPU reads them, times up to 8 rows of inputs
// rounded to bytes; the sums of a group are integers, exact, as on the CPU. A block has a tile, its warps
// share the groups. Bound: the bytes of the weights, once for 8 rows of inputs.
#include <type_traits>

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

struct Rows {
  const uint8_t* tiles;
  int64_t n_in, n_out, tile_bytes;
  const int8_t* code;
  const float* scale;
  const float* bias;
  float* y;
  int64_t ldy;
  int accumulate;
};

template <Packing p, int N>
__global__ __launch_bounds__(32 * kWarps) void multiply_tiles(const __grid_constant__ Rows a) {
  constexpr int kRecord = static_cast<int>(kernels::record_bytes(p));
  constexpr int kScales = static_cast<int>(kernels::scale_bytes(p));
  constexpr int kCodes = static_cast<int>(kernels::group_code_bytes(p));
  constexpr bool kSuper = kernels::is_super(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = lane / 8, pair = lane % 8;
  const uint8_t* tile = a.tiles + blockIdx.x * a.tile_bytes;
  const int n_group = static_cast<int>(a.n_in / 32), n_unit = (n_group + 7) / 8;
  float sum[N][2] = {};
  for (int unit = warp; unit < n_unit; unit += kWarps) {
    const int groups = kSuper ? 8 : min(8, n_group - 8 * unit);
    const uint8_t* record = tile + static_cast<int64_t>(kSuper ? unit : 8 * unit) * kRecord;
    UnitScales<p> scales;
    scales.load(record, pair);
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      if (!kSuper && g >= groups) break;
      const uint8_t* at = kSuper ? record + kScales + g * kCodes : record + g * kRecord + kScales;
      const CodeWords w = load_codes<p>(at, i, pair);
      const PairScale s = scales.of(kSuper ? record : record + g * kRecord, g, pair);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        const uint2 x =
            __ldg(reinterpret_cast<const uint2*>(a.code + r * a.n_in + unit * 256) + i * groups + g);
        const float scale = __ldg(a.scale + static_cast<int64_t>(r) * n_group + 8 * unit + g);
        if constexpr (p == Packing::q6_k) {
          const float t0 = static_cast<float>(dot4(x.x, 0x01010101U, 0));
          const float t1 = static_cast<float>(dot4(x.y, 0x01010101U, 0));
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float low = static_cast<float>(dot4(w.low[k], x.x, 0)) - 32 * t0;
            const float high = static_cast<float>(dot4(w.high[k], x.y, 0)) - 32 * t1;
            sum[r][k] += scale * (s.d[k] * low + s.m[k] * high);
          }
        } else {
          const float total = p == Packing::q8_0
                                  ? 0.0F
                                  : static_cast<float>(dot4(x.x, 0x01010101U, dot4(x.y, 0x01010101U, 0)));
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float dot = static_cast<float>(dot4(w.low[k], x.x, dot4(w.high[k], x.y, 0)));
            sum[r][k] += scale * (s.d[k] * dot + s.m[k] * total);
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
  const int64_t o = blockIdx.x * int64_t{16} + threadIdx.x % 16;
  const int r = threadIdx.x / 16;
  if (r >= N || o >= a.n_out) return;
  float x = a.bias != nullptr ? a.bias[o] : 0.0F;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) x += parts[w][r][threadIdx.x % 16];
  float& y = a.y[r * a.ldy + o];
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
  if (o >= n_out) return;
  float sum = 0;
  for (int64_t i = threadIdx.x % 32; i < n_in; i += 32) sum += number(w[o * n_in + i]) * x[r * n_in + i];
#pragma unroll
  for (int k = 16; k > 0; k /= 2) sum += __shfl_xor_sync(~0U, sum, k);
  if (threadIdx.x % 32 != 0) return;
  if (bias != nullptr) sum += bias[o];
  y[r * ldy + o] = accumulate != 0 ? y[r * ldy + o] + sum : sum;
}

template <Packing p>
void launch_tiles(const device::MultiplyArgs& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(kernels::pack_tiles(a.w.n_out));
  int64_t first = 0;
  while (first < a.n) {
    const int64_t left = a.n - first;
    const Rows rows = {static_cast<const uint8_t*>(a.w.data),
                       a.w.n_in,
                       a.w.n_out,
                       kernels::tile_bytes(p, a.w.n_in),
                       a.code + first * a.w.n_in,
                       a.scale + first * (a.w.n_in / 32),
                       a.bias,
                       a.y + first * a.ldy,
                       a.ldy,
                       a.accumulate};
    // Sums of a row are in one order whatever the number of rows.
    if (left >= kMostRows) {
      multiply_tiles<p, 8><<<blocks, 32 * kWarps, 0, stream>>>(rows);
      first += 8;
    } else if (left >= 4) {
      multiply_tiles<p, 4><<<blocks, 32 * kWarps, 0, stream>>>(rows);
      first += 4;
    } else if (left >= 2) {
      multiply_tiles<p, 2><<<blocks, 32 * kWarps, 0, stream>>>(rows);
      first += 2;
    } else {
      multiply_tiles<p, 1><<<blocks, 32 * kWarps, 0, stream>>>(rows);
      first += 1;
    }
  }
}

template <class T>
void launch_rows(const device::MultiplyArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((a.w.n_out + kWarps - 1) / kWarps), static_cast<unsigned>(a.n));
  multiply_rows<<<grid, 32 * kWarps, 0, stream>>>(static_cast<const T*>(a.w.data), a.f32, a.w.n_in, a.w.n_out,
                                                  a.bias, a.y, a.ldy, a.accumulate);
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
  switch (a.w.form) {
    case device::kRowsF32:
      launch_rows<float>(a, stream);
      return true;
    case device::kRowsF16:
      launch_rows<__half>(a, stream);
      return true;
    case device::kRowsBf16:
      launch_rows<__nv_bfloat16>(a, stream);
      return true;
    default:
      return with_packing(a.w.form, [&](auto p) { launch_tiles<decltype(p)::value>(a, stream); });
  }
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
