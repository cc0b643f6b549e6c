// Products of a prompt: y [n, n_out] (+)= x w^T + bias of bf16 x [n, n_in], w [n_out, n_in] with float32
// sums. A block has 128 x 128 outputs, a warp 64 x 32; four stages of 32 inputs are on their way. Bound:
// operations.
#include "exec/cuda/layer_ops.h"
#include "exec/cuda/mma.cuh"

namespace narrows::cuda {

namespace {

constexpr int kTile = 128, kDepth = 32, kStages = 4, kThreads = 256;
/// Halves of a row in shared memory: 80 bytes, so that 8 rows of 16 bytes fall into all banks.
constexpr int kRow = kDepth + 8;
constexpr int kStageHalves = 2 * kTile * kRow;
constexpr int kSharedBytes = kStages * kStageHalves * 2;

__global__ __launch_bounds__(kThreads, 2) void gemm_bf16(const __grid_constant__ device::GemmArgs a) {
  extern __shared__ __align__(16) __nv_bfloat16 shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = blockIdx.y * int64_t{kTile}, first_out = blockIdx.x * int64_t{kTile};
  const int warp_row = warp % 2 * 64, warp_out = warp / 2 * 32;
  const auto* x = static_cast<const __nv_bfloat16*>(a.x);
  const auto* w = static_cast<const __nv_bfloat16*>(a.w);
  const int n_step = static_cast<int>(a.n_in / kDepth);

  // A thread copies two times 16 bytes of each factor; rows beyond the last are the last's, never written.
  const auto fetch = [&](int step) {
    __nv_bfloat16* to = shared + step % kStages * kStageHalves;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int piece = threadIdx.x + i * kThreads, row = piece / 4, at = piece % 4 * 8;
      const int64_t xr = min(first_row + row, a.n - 1), wr = min(first_out + row, a.n_out - 1);
      copy_async(to + row * kRow + at, x + xr * a.n_in + step * int64_t{kDepth} + at);
      copy_async(to + (kTile + row) * kRow + at, w + wr * a.n_in + step * int64_t{kDepth} + at);
    }
  };
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < n_step) fetch(s);
    commit_copies();
  }

  float sum[4][4][4] = {};
  for (int step = 0; step < n_step; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < n_step) fetch(step + kStages - 1);
    commit_copies();
    const __nv_bfloat16* xs = shared + step % kStages * kStageHalves;
    const __nv_bfloat16* ws = xs + kTile * kRow;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t fx[4][4], fw[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_matrix4(fx[i], xs + (warp_row + 16 * i + lane % 16) * kRow + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrix4(fw[j],
                     ws + (warp_out + 16 * j + lane / 16 * 8 + lane % 8) * kRow + k + lane / 8 % 2 * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma_bf16(sum[i][j], fx[i][0], fx[i][1], fx[i][2], fx[i][3], fw[j / 2][j % 2 * 2],
                   fw[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t r = first_row + warp_row + 16 * i + g + e / 2 * 8;
        const int64_t o = first_out + warp_out + 8 * j + 2 * c + e % 2;
        if (r >= a.n || o >= a.n_out) continue;
        const float y = sum[i][j][e] + (a.bias != nullptr ? a.bias[o] : 0.0F);
        float& to = a.y[r * a.ldy + o];
        to = a.accumulate != 0 ? to + y : y;
      }
    }
  }
}

}  // namespace

void launch_gemm(const device::GemmArgs& a, cudaStream_t stream) {
  cudaFuncSetAttribute(gemm_bf16, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  const dim3 grid(static_cast<unsigned>((a.n_out + kTile - 1) / kTile),
                  static_cast<unsigned>((a.n + kTile - 1) / kTile));
  gemm_bf16<<<grid, kThreads, kSharedBytes, stream>>>(a);
}

}  // namespace narrows::cuda
