// Stages 1 and 2 of a SALS step on the device: the query through the basis, tokens scored by the first
// rank_score latent coordinates (tensor cores, rows straight from memory), the best ones chosen exactly.
// Bound: 2 rank_score bytes a token. The query's latents are split into two halves each (22 bits), which
// costs nothing: a product has eight columns, and a SALS step one query.
#include "exec/cuda/launch.h"
#include "exec/cuda/select.cuh"
#include "kv/sals/cuda/sals_common.cuh"

namespace narrows::cuda {

namespace {

constexpr int kRowGroups = 4;

/// Sums over a block's rows of the basis: projected [row blocks][n_seq][rank_score]; a thread has two columns
/// of a quarter of the rows. The last block of some sequences adds up all, scales into the range of halves
/// (the order of scores is all that counts) and writes the query's latents, f16 [n_seq][2][rank_score]:
/// rounded, and 2048 times what rounding left.
__global__ __launch_bounds__(1024) void sals_project(const __grid_constant__ SalsParams p) {
  extern __shared__ __align__(16) float shared[];
  __shared__ float top_of[32];
  __shared__ bool is_last;
  const auto& heads = p.a.heads;
  const int hd = heads.head_dim, width = heads.n_head_kv * hd, group = p.plan.group,
            rank_score = p.a.rank_score;
  const int first = blockIdx.x * kProjectRows, n_row = min(kProjectRows, width - first);
  const int first_seq = blockIdx.y * kProjectSequences,
            n_seq = min(kProjectSequences, heads.n_seq - first_seq);
  float* joint = shared;                                    // [kProjectRows][kProjectSequences]
  float* sums = shared + kProjectRows * kProjectSequences;  // [kRowGroups][kProjectSequences][rank_score]
  for (int i = threadIdx.x; i < kProjectSequences * kProjectRows; i += blockDim.x) {
    const int s = i / kProjectRows, row = i % kProjectRows, channel = first + row;
    float sum = 0;
    if (s < n_seq && row < n_row) {
      const __half* q = static_cast<const __half*>(heads.q) + (first_seq + s) * heads.q_stride;
      for (int h = 0; h < group; ++h) sum += __half2float(q[(channel / hd * group + h) * hd + channel % hd]);
    }
    joint[row * kProjectSequences + s] = sum;
  }
  __syncthreads();
  const int across = static_cast<int>(blockDim.x) / kRowGroups, part = static_cast<int>(threadIdx.x) / across;
  const int column = 2 * (static_cast<int>(threadIdx.x) % across);
  if (column < rank_score) {
    float2 sum[kProjectSequences] = {};
    const __half* basis =
        static_cast<const __half*>(p.a.basis) + static_cast<int64_t>(first) * p.a.rank + column;
    constexpr int kRows = kProjectRows / kRowGroups;
#pragma unroll 16
    for (int i = 0; i < kRows; ++i) {
      // Rows behind the last: their queries are zeros. No branch, so that loads are on their way together.
      const int row = part * kRows + i, from = min(row, n_row - 1);
      const float2 u = __half22float2(
          __ldg(reinterpret_cast<const __half2*>(basis + static_cast<int64_t>(from) * p.a.rank)));
#pragma unroll
      for (int s = 0; s < kProjectSequences; s += 4) {
        const float4 q = *reinterpret_cast<const float4*>(joint + row * kProjectSequences + s);
        sum[s].x += q.x * u.x, sum[s].y += q.x * u.y;
        sum[s + 1].x += q.y * u.x, sum[s + 1].y += q.y * u.y;
        sum[s + 2].x += q.z * u.x, sum[s + 2].y += q.z * u.y;
        sum[s + 3].x += q.w * u.x, sum[s + 3].y += q.w * u.y;
      }
    }
#pragma unroll
    for (int s = 0; s < kProjectSequences; ++s)
      *reinterpret_cast<float2*>(sums + (part * kProjectSequences + s) * rank_score + column) = sum[s];
  }
  __syncthreads();
  float* to = p.at<float>(p.plan.projected);
  for (int i = threadIdx.x; i < n_seq * rank_score; i += blockDim.x) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kRowGroups; ++k) sum += sums[k * kProjectSequences * rank_score + i];
    __stcg(to + (static_cast<int64_t>(blockIdx.x) * heads.n_seq + first_seq) * rank_score + i, sum);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = p.at<uint32_t>(p.plan.project_counter) + blockIdx.y;
    is_last = atomicAdd(counter, 1U) == gridDim.x - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = 4 * static_cast<int>(threadIdx.x); i < n_seq * rank_score;
       i += 4 * static_cast<int>(blockDim.x)) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 16
    for (int b = 0; b < p.plan.n_project; ++b) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(
          to + (static_cast<int64_t>(b) * heads.n_seq + first_seq) * rank_score + i));
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    // A query that is not finite has no output worth the name; its selection may be any.
    const auto usable = [](float x) { return fabsf(x) < 1e30F ? x : 0.0F; };
    *reinterpret_cast<float4*>(sums + i) =
        make_float4(usable(sum.x), usable(sum.y), usable(sum.z), usable(sum.w));
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < n_seq) {
    float top = 0;
    for (int i = lane; i < rank_score; i += 32) top = fmaxf(top, fabsf(sums[warp * rank_score + i]));
#pragma unroll
    for (int i = 1; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0U, top, i));
    if (lane == 0) top_of[warp] = top;
  }
  __syncthreads();
  __half* query = p.at<__half>(p.plan.latent_query) + static_cast<int64_t>(first_seq) * 2 * rank_score;
  for (int i = threadIdx.x; i < n_seq * rank_score; i += blockDim.x) {
    const int s = i / rank_score, k = i % rank_score;
    const float x = top_of[s] > 0 ? sums[i] / top_of[s] : 0.0F;
    const __half high = __float2half_rn(x);
    query[(s * 2) * rank_score + k] = high;
    query[(s * 2 + 1) * rank_score + k] = __float2half_rn((x - __half2float(high)) * 2048);
  }
}

constexpr int kWarps = 4;

__global__ __launch_bounds__(32 * kWarps) void sals_score(const __grid_constant__ SalsParams p) {
  const int seq = blockIdx.y, n = p.a.pages.n_tokens[seq], rank_score = p.a.rank_score;
  const int first = blockIdx.x * kScoreTokens;
  if (first >= n) return;
  const __half* query = p.at<const __half>(p.plan.latent_query) + static_cast<int64_t>(seq) * 2 * rank_score;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  float* scores = p.at<float>(p.plan.scores) + static_cast<int64_t>(seq) * p.a.pages.n_max;
  for (int t = first + warp * 16; t < min(n, first + kScoreTokens); t += 16 * kWarps) {
    const uint8_t* page = sals_page(p, seq, t / NARROWS_CUDA_PAGE);
    const int64_t row = p.a.rank * 2;
    const uint8_t* k0 = page + (t % NARROWS_CUDA_PAGE + g) * row + c * 16;
    const bool has0 = t + g < n, has1 = t + g + 8 < n;
    float s[4] = {};
#pragma unroll 8
    for (int k = 0; k < rank_score / 32; ++k) {
      const uint4 zero = make_uint4(0, 0, 0, 0);
      const uint4 x = has0 ? load_once(k0 + k * 64) : zero;
      const uint4 y = has1 ? load_once(k0 + 8 * row + k * 64) : zero;
      const uint4 b = g < 2 ? *reinterpret_cast<const uint4*>(query + g * rank_score + k * 32 + c * 8) : zero;
      mma_f16(s, x.x, y.x, x.y, y.y, b.x, b.y);
      mma_f16(s, x.z, y.z, x.w, y.w, b.z, b.w);
    }
    if (c == 0 && has0) scores[t + g] = s[0] + s[1] / 2048;
    if (c == 0 && has1) scores[t + g + 8] = s[2] + s[3] / 2048;
  }
}

/// Keys in the order of floats; 0 is none's.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x80000000U) != 0 ? max(1U, ~bits) : bits | 0x80000000U;
}
__device__ inline float float_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000U) != 0 ? key & 0x7FFFFFFFU : ~key);
}

/// Bins of equal width from the lowest score to the highest.
struct LinearBin {
  float low, scale;
  __device__ uint32_t operator()(uint32_t key) const {
    return min(static_cast<uint32_t>(fmaxf(0.0F, (float_of(key) - low) * scale)), kBins - 1U);
  }
};

__global__ __launch_bounds__(kSelectThreads, 2) void sals_select(const __grid_constant__ SalsParams p,
                                                                 const int in_shared) {
  extern __shared__ __align__(16) uint32_t dynamic[];
  __shared__ SelectShared s;
  __shared__ float low_of[kSelectWarps], high_of[kSelectWarps];
  const int seq = blockIdx.x, n = p.a.pages.n_tokens[seq], lane = threadIdx.x % 32;
  const auto budget = static_cast<uint32_t>(max(0, min(p.a.pages.budget[seq], p.a.pages.max_budget)));
  float* scores = p.at<float>(p.plan.scores) + static_cast<int64_t>(seq) * p.a.pages.n_max;
  uint32_t* keys = in_shared != 0 ? dynamic : reinterpret_cast<uint32_t*>(scores);
  uint32_t* used = in_shared != 0 ? dynamic + p.a.pages.n_max : dynamic;
  float low = INFINITY, high = -INFINITY;
  for (int t = threadIdx.x; t < n; t += kSelectThreads) {
    float x = __ldcg(&scores[t]);
    if (!(fabsf(x) < 3e38F)) x = 0;  // latents that are not finite
    keys[t] = key_of(x);
    low = fminf(low, x);
    high = fmaxf(high, x);
  }
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    low = fminf(low, __shfl_xor_sync(~0U, low, i));
    high = fmaxf(high, __shfl_xor_sync(~0U, high, i));
  }
  if (lane == 0) low_of[threadIdx.x / 32] = low;
  if (lane == 0) high_of[threadIdx.x / 32] = high;
  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) s.hist[i] = 0;
  __syncthreads();
  for (int w = 0; w < kSelectWarps; ++w) {
    low = fminf(low, low_of[w]);
    high = fmaxf(high, high_of[w]);
  }
  Threshold threshold{0, 0};
  if (static_cast<uint32_t>(n) > budget) {
    const float width = high - low;
    const LinearBin bin{low, width > 0 && width < 3e38F ? (kBins - 1) / width : 0.0F};
    for (int t = threadIdx.x; t < n; t += kSelectThreads) atomicAdd(&s.hist[bin(keys[t])], 1U);
    __syncthreads();
    threshold = budget > 0 ? find_threshold(s, keys, n, budget, bin) : Threshold{~0U, 0};
  }
  __syncthreads();
  int32_t* selected = p.at<int32_t>(p.plan.at.selected) + static_cast<int64_t>(seq) * p.a.pages.max_budget;
  const uint32_t n_selected = take(s, keys, n, threshold, selected, budget);
  __syncthreads();
  uint32_t n_missing = n_selected;
  if (p.a.kept.keys != nullptr) {
    const auto& kept = p.a.kept;
    const int64_t list = seq;
    n_missing = hold(s, selected, n_selected, p.at<uint16_t>(p.plan.at.slot) + list * p.a.pages.max_budget,
                     p.at<int32_t>(p.plan.at.missing) + list * p.a.pages.max_budget,
                     kept.token_of + list * kept.capacity, kept.slot_of + list * kept.ld, kept.hand + list,
                     kept.capacity, used);
  }
  if (threadIdx.x == 0) {
    p.at<uint32_t>(p.plan.at.n_selected)[seq] = n_selected;
    p.at<uint32_t>(p.plan.at.n_missing)[seq] = n_missing;
  }
}

constexpr int kSharedTokens = 17408;  // as in klt_select.cu

}  // namespace

int launch_sals_select(const SalsParams& p, cudaStream_t stream) {
  const auto& heads = p.a.heads;
  const int threads = (p.a.rank_score / 2 + 31) / 32 * 32 * kRowGroups;
  const int project_bytes = (kProjectRows + kRowGroups * p.a.rank_score) * kProjectSequences * 4;
  if (cudaFuncSetAttribute(sals_project, cudaFuncAttributeMaxDynamicSharedMemorySize, project_bytes) !=
      cudaSuccess)
    return launched();
  const dim3 blocks(static_cast<unsigned>(p.plan.n_project),
                    static_cast<unsigned>((heads.n_seq + kProjectSequences - 1) / kProjectSequences));
  sals_project<<<blocks, static_cast<unsigned>(threads < 256 ? 256 : threads),
                 static_cast<size_t>(project_bytes), stream>>>(p);
  const dim3 chunks(static_cast<unsigned>(p.plan.n_chunk), static_cast<unsigned>(heads.n_seq));
  sals_score<<<chunks, 32 * kWarps, 0, stream>>>(p);
  const int in_shared = p.a.pages.n_max <= kSharedTokens ? 1 : 0;
  const int kept = p.a.kept.keys != nullptr ? (p.a.kept.capacity + 31) / 32 * 4 : 0;
  const int bytes = (in_shared != 0 ? p.a.pages.n_max * 4 : 0) + kept;
  if (cudaFuncSetAttribute(sals_select, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched();
  sals_select<<<static_cast<unsigned>(heads.n_seq), kSelectThreads, static_cast<size_t>(bytes), stream>>>(
      p, in_shared);
  return launched();
}

}  // namespace narrows::cuda
