// What a klt page's tokens get of the attention of queries after it, on the device: a block takes a page and
// a KV head. The host picks anchors from the shares (kv/klt/klt_anchor.h).
#include <cuda_fp16.h>

#include "exec/cuda/layer_ops.h"

namespace narrows::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTokens = NARROWS_CUDA_PAGE;
constexpr int kQueries = 4, kStride = 16, kMostGroup = 8, kMostSinks = 128;
constexpr int kRows = kQueries * kMostGroup;
/// Keys that are in shared memory at a time.
constexpr int kKeys = 32;
constexpr int kMostKeys = kMostSinks + 2 * kTokens;

template <int HD>
struct Shared {
  float q[kRows][HD];
  float key[kKeys][HD + 1];
  float score[kRows][kMostKeys];
  float share[kRows / 4][kTokens];
};

/// Coordinate i of a head that is rotated by the pairs of `rope` [HD / 2][2].
template <int HD, class Fn>
__device__ float rotated(Fn&& x, int i, const float* rope) {
  const int pair = i % (HD / 2);
  const float cosine = rope[2 * pair], sine = rope[2 * pair + 1];
  return i < HD / 2 ? x(i) * cosine - x(i + HD / 2) * sine : x(i) * cosine + x(i - HD / 2) * sine;
}

template <int HD>
__global__ __launch_bounds__(kThreads) void klt_shares(const __grid_constant__ device::KltSharesArgs a) {
  extern __shared__ __align__(16) char memory[];
  auto& s = *reinterpret_cast<Shared<HD>*>(memory);
  const int page = blockIdx.x, head = blockIdx.y, group = a.n_head / a.n_head_kv;
  const int64_t token = int64_t{page} * kTokens;  // of the page's first, among the keys
  const int n_after = static_cast<int>(min(static_cast<int64_t>(a.n_after), a.n_token - token - kTokens));
  const int n_query = n_after <= 0 ? 0 : (n_after + kStride - 1) / kStride;
  const int n_row = n_query * group, n_key = a.n_sink + kTokens + max(n_after, 0);
  const auto* samples = static_cast<const __half*>(a.samples);
  for (int i = threadIdx.x; i < n_row * HD; i += kThreads) {
    const int row = i / HD, query = row / group;
    const int64_t at = token + kTokens + query * kStride;  // of the query, among the keys
    const __half* q = samples + (at / kStride * a.n_head + head * group + row % group) * HD;
    s.q[row][i % HD] =
        rotated<HD>([&](int c) { return __half2float(q[c]); }, i % HD, a.rope + (a.position + at) * HD);
  }
  for (int first = 0; first < n_key; first += kKeys) {
    __syncthreads();
    for (int i = threadIdx.x; i < kKeys * HD; i += kThreads) {
      const int t = first + i / HD, c = i % HD;
      float x = 0;
      if (t < a.n_sink) {
        x = a.sinks[t * a.ld + head * HD + c];
      } else if (t < n_key) {
        const int64_t at = token + t - a.n_sink;
        const float* k = a.keys + at * a.ld + head * HD;
        x = rotated<HD>([&](int j) { return k[j]; }, c, a.rope + (a.position + at) * HD);
      }
      s.key[i / HD][c] = x;
    }
    __syncthreads();
    const int t = threadIdx.x % kKeys;
    for (int row = threadIdx.x / kKeys; row < n_row; row += kThreads / kKeys) {
      float sum = 0;
#pragma unroll 8
      for (int c = 0; c < HD; ++c) sum = fmaf(s.q[row][c], s.key[t][c], sum);
      if (first + t < n_key) s.score[row][first + t] = sum * a.scale;
    }
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float mine[2] = {0, 0};  // of tokens lane and 32 + lane, over the warp's rows
  for (int row = warp; row < n_row; row += kThreads / 32) {
    const int seen = a.n_sink + kTokens + row / group * kStride + 1;
    float top = -3.402823466e38F;
    for (int t = lane; t < seen; t += 32) top = fmaxf(top, s.score[row][t]);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0U, top, i));
    float sum = 0;
    for (int t = lane; t < seen; t += 32) sum += expf(s.score[row][t] - top);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0U, sum, i);
#pragma unroll
    for (int i = 0; i < 2; ++i) mine[i] += expf(s.score[row][a.n_sink + 32 * i + lane] - top) / sum;
  }
  s.share[warp][lane] = mine[0];
  s.share[warp][32 + lane] = mine[1];
  __syncthreads();
  if (threadIdx.x < kTokens) {
    float sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += s.share[w][threadIdx.x];
    a.share[(int64_t{page} * a.n_head_kv + head) * kTokens + threadIdx.x] = sum;
  }
}

template <int HD>
bool launch(const device::KltSharesArgs& a, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<HD>);
  if (cudaFuncSetAttribute(klt_shares<HD>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) !=
      cudaSuccess)
    return false;
  klt_shares<HD><<<dim3(a.n_page, a.n_head_kv), kThreads, kBytes, stream>>>(a);
  return true;
}

}  // namespace

bool launch_klt_shares(const device::KltSharesArgs& a, cudaStream_t stream) {
  if (a.n_sink > kMostSinks || a.n_head / a.n_head_kv > kMostGroup || a.n_after >= kTokens) return false;
  return a.head_dim == 128 ? launch<128>(a, stream) : a.head_dim == 64 && launch<64>(a, stream);
}

}  // namespace narrows::cuda
