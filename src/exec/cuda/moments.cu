// Second moments of rows: tiles of 128 x 128 on and above the diagonal, of slices of the rows in float32,
// then the slices' sums in double. And rows on their way to the host or to other kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "exec/cuda/layer_ops.h"

namespace narrows::cuda {

namespace {

using device::MomentsArgs;

constexpr int kThreads = 256;
constexpr int kTile = 128, kDepth = 16, kOwn = 8;
/// Blocks of an SM that moment_slices() leaves registers for: two would spill, but for Hopper.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocksOfMoments = 2;
#else
constexpr int kBlocksOfMoments = 1;
#endif

template <bool BF16>
__device__ float element(const MomentsArgs& a, int64_t at) {
  if constexpr (BF16) {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(a.x)[at]);
  } else {
    return static_cast<const float*>(a.x)[at];
  }
}

/// Means of the columns: a warp takes 32 columns of every eighth row.
__global__ __launch_bounds__(kThreads) void centre_rows(const __grid_constant__ MomentsArgs a) {
  __shared__ double shared[kThreads / 32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.x * 32 + lane, matrix = blockIdx.y;
  double sum = 0;
  if (column < a.width) {
    for (int64_t r = warp; r < a.n; r += kThreads / 32)
      sum += static_cast<double>(element<false>(a, r * a.ld + matrix * a.stride + column));
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= a.width) return;
  sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) sum += shared[w][lane];
  a.centre[int64_t{matrix} * a.width + column] = static_cast<float>(sum / static_cast<double>(a.n));
}

/// Columns [column, column + kTile) of kDepth vectors from `first` on, of those before `end`, the centre
/// taken away.
template <bool BF16>
__device__ void load_rows(const MomentsArgs& a, int matrix, int column, int64_t first, int64_t end,
                          float (&to)[kDepth][kTile]) {
  const int c = threadIdx.x % kTile;
  const bool held = column + c < a.width;
  const float centre = held && a.centre != nullptr ? a.centre[matrix * a.width + column + c] : 0.0F;
#pragma unroll
  for (int i = 0; i < kDepth / (kThreads / kTile); ++i) {
    const int k = i * (kThreads / kTile) + threadIdx.x / kTile;
    const int64_t vector = first + k, row = vector / a.n_sub, s = vector % a.n_sub;
    to[k][c] = held && vector < end
                   ? element<BF16>(a, row * a.ld + matrix * a.stride + s * a.width + column + c) - centre
                   : 0.0F;
  }
}

/// Blocks x are tiles on and above the diagonal (of one or two rows of tiles), y slices, z matrices.
template <bool BF16>
__global__ __launch_bounds__(kThreads,
                             kBlocksOfMoments) void moment_slices(const __grid_constant__ MomentsArgs a) {
  __shared__ float left[kDepth][kTile], right[kDepth][kTile];
  const int tile_i = blockIdx.x == 2 ? 1 : 0, tile_j = blockIdx.x == 0 ? 0 : 1;
  const int matrix = blockIdx.z;
  const int64_t rows = max(device::kMomentVectors / a.n_sub, int64_t{1});
  const int64_t begin = blockIdx.y * rows * a.n_sub, end = min(begin + rows * a.n_sub, a.n * a.n_sub);
  const int64_t square = int64_t{a.width} * a.width;
  float* moments = a.workspace + (int64_t{blockIdx.y} * a.n_matrix + matrix) * (square + a.width);
  const int i0 = threadIdx.x / 16 * 4, j0 = threadIdx.x % 16 * 4;
  float sum[kOwn][kOwn] = {};
  float column = 0;
  for (int64_t first = begin; first < end; first += kDepth) {
    __syncthreads();
    load_rows<BF16>(a, matrix, tile_i * kTile, first, end, left);
    if (tile_i != tile_j) load_rows<BF16>(a, matrix, tile_j * kTile, first, end, right);
    __syncthreads();
    const float(&other)[kDepth][kTile] = tile_i != tile_j ? right : left;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      // Four and four, 64 apart: neighbours read neighbours.
      const float4 l0 = *reinterpret_cast<const float4*>(&left[k][i0]),
                   l1 = *reinterpret_cast<const float4*>(&left[k][64 + i0]),
                   r0 = *reinterpret_cast<const float4*>(&other[k][j0]),
                   r1 = *reinterpret_cast<const float4*>(&other[k][64 + j0]);
      const float l[kOwn] = {l0.x, l0.y, l0.z, l0.w, l1.x, l1.y, l1.z, l1.w};
      const float r[kOwn] = {r0.x, r0.y, r0.z, r0.w, r1.x, r1.y, r1.z, r1.w};
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sum[i][j] = fmaf(l[i], r[j], sum[i][j]);
      }
      if (threadIdx.x < kTile) column += left[k][threadIdx.x];
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int row = tile_i * kTile + i / 4 * 64 + i0 + i % 4;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int to = tile_j * kTile + j / 4 * 64 + j0 + j % 4;
      if (row < a.width && to < a.width) moments[row * a.width + to] = sum[i][j];
    }
  }
  const int c = tile_i * kTile + threadIdx.x;
  if (tile_i == tile_j && threadIdx.x < kTile && c < a.width) moments[square + c] = column;
}

/// A thread a number of a matrix and its sums.
__global__ __launch_bounds__(kThreads) void add_slices(const __grid_constant__ MomentsArgs a,
                                                       int64_t n_slice) {
  const int64_t square = int64_t{a.width} * a.width, all = square + a.width;
  const int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (at >= all) return;
  const int matrix = blockIdx.y;
  int64_t from = at;
  if (at < square) {
    const int64_t i = at / a.width, j = at % a.width;
    if (j / kTile < i / kTile) from = j * a.width + i;
  }
  double sum = 0;
  for (int64_t s = 0; s < n_slice; ++s)
    sum += static_cast<double>(a.workspace[(s * a.n_matrix + matrix) * all + from]);
  double& to = at < square ? a.moments[matrix * square + at] : a.sum[int64_t{matrix} * a.width + at - square];
  to = a.accumulate != 0 ? to + sum : sum;
}

__global__ __launch_bounds__(kThreads) void sample_rows(const __grid_constant__ device::SampleArgs a) {
  const float* from = a.x + (a.first + blockIdx.x * a.step) * a.ld;
  auto* to = static_cast<__half*>(a.to) + blockIdx.x * a.width;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) to[i] = __float2half_rn(from[i]);
}

}  // namespace

bool launch_moments(const MomentsArgs& a, cudaStream_t stream) {
  if (a.width > 2 * kTile || (a.makes_centre != 0 && (a.n_sub != 1 || a.x_is_bf16 != 0))) return false;
  if (a.makes_centre != 0) centre_rows<<<dim3((a.width + 31) / 32, a.n_matrix), kThreads, 0, stream>>>(a);
  const int64_t n_slice = device::moment_slices(a.n, a.n_sub);
  const dim3 grid(a.width > kTile ? 3 : 1, static_cast<unsigned>(n_slice), a.n_matrix);
  if (a.x_is_bf16 != 0) {
    moment_slices<true><<<grid, kThreads, 0, stream>>>(a);
  } else {
    moment_slices<false><<<grid, kThreads, 0, stream>>>(a);
  }
  const int64_t all = int64_t{a.width} * (a.width + 1);
  add_slices<<<dim3(static_cast<unsigned>((all + kThreads - 1) / kThreads), a.n_matrix), kThreads, 0,
               stream>>>(a, n_slice);
  return true;
}

void launch_sample(const device::SampleArgs& a, cudaStream_t stream) {
  if (a.n > 0) sample_rows<<<static_cast<unsigned>(a.n), kThreads, 0, stream>>>(a);
}

}  // namespace narrows::cuda
