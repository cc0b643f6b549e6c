// Attention of a prompt's rows to a cache in blocks of 64 tokens: a block of threads has 64 rows of a head, a
// warp 16; a block of the cache is a tile, the next one is on its way. f16 factors, float32 sums.
#include "exec/cuda/layer_ops.h"
#include "exec/cuda/mma.cuh"

namespace narrows::cuda {

namespace {

constexpr int kRows = 64, kTokens = static_cast<int>(device::kBlockTokens), kThreads = 128;

template <int HD>
inline constexpr int kLd = HD + 8;  ///< halves of a row in shared memory
template <int HD>
inline constexpr int kSharedBytes = 4 * kTokens* kLd<HD> * 2;

__device__ inline void load_transposed4(uint32_t (&a)[4], const void* shared) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(at)
               : "memory");
}

/// Copies 16 bytes, or writes zeros.
__device__ inline void copy_or_zero(void* shared, const void* from, bool has) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(has ? 16 : 0)
               : "memory");
}

template <int HD>
__global__ __launch_bounds__(kThreads, 2) void attend_prompt(const __grid_constant__ device::PromptArgs a) {
  extern __shared__ __align__(16) __half tiles[];  // [2][keys, values][kTokens][kLd]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  // The longest rows first.
  const int64_t first = (static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x) * kRows;
  const int head = blockIdx.y, kv = head / (a.n_head / a.n_head_kv);
  const int64_t width = static_cast<int64_t>(a.n_head) * HD, n_token = a.first + a.n;
  const int64_t last_row = min(first + kRows, a.n) - 1;
  const int end = static_cast<int>((a.first + last_row) / kTokens) + 1;
  const int begin =
      a.window > 0 ? static_cast<int>(max(int64_t{0}, a.first + first + 1 - a.window) / kTokens) : 0;
  const int64_t half_block = static_cast<int64_t>(a.n_head_kv) * kTokens * HD;

  const auto fetch = [&](int tile) {
    const __half* k =
        static_cast<const __half*>(a.pool) + a.table[tile] * 2 * half_block + kv * int64_t{kTokens} * HD;
    __half* to = tiles + tile % 2 * 2 * kTokens * kLd<HD>;
    for (int i = threadIdx.x; i < kTokens * HD / 8; i += kThreads) {
      const int t = i / (HD / 8), at = i % (HD / 8) * 8;
      const bool has = tile * int64_t{kTokens} + t < n_token;
      copy_or_zero(to + t * kLd<HD> + at, k + t * HD + at, has);
      copy_or_zero(to + (kTokens + t) * kLd<HD> + at, k + half_block + t * HD + at, has);
    }
  };
  fetch(begin);
  commit_copies();

  const int64_t row[2] = {first + warp * 16 + g, first + warp * 16 + g + 8};
  uint32_t q[HD / 16][4];
#pragma unroll
  for (int j = 0; j < HD / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t r = row[i % 2];
      q[j][i] = r < a.n ? *reinterpret_cast<const uint32_t*>(static_cast<const __half*>(a.q) + r * width +
                                                             head * HD + 16 * j + i / 2 * 8 + 2 * c)
                        : 0U;
    }
  }

  const float scale2 = a.scale * kLog2e;
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  float out[HD / 8][4] = {};
  for (int tile = begin; tile < end; ++tile) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < end) fetch(tile + 1);
    commit_copies();
    const __half* keys = tiles + tile % 2 * 2 * kTokens * kLd<HD>;
    const __half* values = keys + kTokens * kLd<HD>;
    float s[kTokens / 8][4] = {};
#pragma unroll
    for (int j = 0; j < HD / 16; ++j) {
#pragma unroll
      for (int t = 0; t < kTokens / 16; ++t) {
        uint32_t k[4];
        load_matrix4(k, keys + (16 * t + lane / 16 * 8 + lane % 8) * kLd<HD> + 16 * j + lane / 8 % 2 * 8);
        mma_f16(s[2 * t], q[j][0], q[j][1], q[j][2], q[j][3], k[0], k[1]);
        mma_f16(s[2 * t + 1], q[j][0], q[j][1], q[j][2], q[j][3], k[2], k[3]);
      }
    }
    float most[2] = {top[0], top[1]};
#pragma unroll
    for (int t = 0; t < kTokens / 8; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t token = tile * int64_t{kTokens} + 8 * t + 2 * c + e % 2;
        const int64_t position = a.first + row[e / 2];
        const bool sees = token <= position && (a.window == 0 || token + a.window > position);
        s[t][e] = sees ? s[t][e] * scale2 : -INFINITY;
        most[e / 2] = fmaxf(most[e / 2], s[t][e]);
      }
    }
    float keep[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = fmaxf(most[i], __shfl_xor_sync(~0U, most[i], 1));
      most[i] = fmaxf(most[i], __shfl_xor_sync(~0U, most[i], 2));
      const float base = most[i] == -INFINITY ? 0.0F : most[i];
      keep[i] = power2(top[i] - base);
      top[i] = most[i];
      most[i] = base;
      total[i] *= keep[i];
    }
#pragma unroll
    for (int d = 0; d < HD / 8; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[d][e] *= keep[e / 2];
    }
#pragma unroll
    for (int t = 0; t < kTokens / 8; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[t][e] = power2(s[t][e] - most[e / 2]);
        total[e / 2] += s[t][e];
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) {
      const uint32_t p[4] = {pack_half(s[2 * t][0], s[2 * t][1]), pack_half(s[2 * t][2], s[2 * t][3]),
                             pack_half(s[2 * t + 1][0], s[2 * t + 1][1]),
                             pack_half(s[2 * t + 1][2], s[2 * t + 1][3])};
#pragma unroll
      for (int d = 0; d < HD / 16; ++d) {
        uint32_t v[4];
        load_transposed4(v, values + (16 * t + lane % 16) * kLd<HD> + 16 * d + lane / 16 * 8);
        mma_f16(out[2 * d], p[0], p[1], p[2], p[3], v[0], v[1]);
        mma_f16(out[2 * d + 1], p[0], p[1], p[2], p[3], v[2], v[3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    total[i] += __shfl_xor_sync(~0U, total[i], 1);
    total[i] += __shfl_xor_sync(~0U, total[i], 2);
    if (row[i] >= a.n) continue;
    const float inverse = 1 / total[i];
    __half* to = static_cast<__half*>(a.out) + row[i] * width + head * HD + 2 * c;
#pragma unroll
    for (int d = 0; d < HD / 8; ++d)
      *reinterpret_cast<uint32_t*>(to + 8 * d) =
          pack_half(out[d][2 * i] * inverse, out[d][2 * i + 1] * inverse);
  }
}

template <int HD>
void launch(const device::PromptArgs& a, cudaStream_t stream) {
  cudaFuncSetAttribute(attend_prompt<HD>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<HD>);
  const dim3 grid(static_cast<unsigned>((a.n + kRows - 1) / kRows), static_cast<unsigned>(a.n_head));
  attend_prompt<HD><<<grid, kThreads, kSharedBytes<HD>, stream>>>(a);
}

}  // namespace

bool launch_prompt(const device::PromptArgs& a, cudaStream_t stream) {
  if (a.head_dim == 64) {
    launch<64>(a, stream);
  } else if (a.head_dim == 128) {
    launch<128>(a, stream);
  } else {
    return false;
  }
  return true;
}

}  // namespace narrows::cuda
