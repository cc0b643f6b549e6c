// Stage 2 of a klt step on the device: scores to probabilities over the whole cache, summed over the query
// heads of a KV head, the tokens that `budget` and `mass` ask for (exactly, as klt_select.cpp finds them),
// and their rows among the kept keys.
#include "exec/cuda/launch.h"
#include "exec/cuda/select.cuh"
#include "kv/klt/cuda/klt_common.cuh"

namespace narrows::cuda {

namespace {

/// Keys are the bits of positive floats up to 8 (a group has at most 8 heads, and its probabilities' sum no
/// more): bins of 1 / 128 octave below that, and one for all under 2^-29.
constexpr uint32_t kTopKey = 0x41000000;
constexpr uint32_t kLowKey = kTopKey - (kBins << 16) + 0x10000;

struct KltBin {
  __device__ uint32_t operator()(uint32_t key) const {
    return key < kLowKey ? 0U : min(((key - kLowKey) >> 16) + 1, kBins - 1U);
  }
};

/// Probabilities as integers, summed in any order with one result.
constexpr float kMassUnit = 268435456.0F;  // 2^28

__global__ __launch_bounds__(kSelectThreads, 2) void klt_select(const __grid_constant__ KltParams p,
                                                                const int in_shared) {
  extern __shared__ __align__(16) uint32_t dynamic[];
  __shared__ SelectShared s;
  __shared__ float top[kTileHeads], factor[kTileHeads];
  const int kv = blockIdx.x, seq = blockIdx.y, group = p.plan.group;
  const int64_t list = static_cast<int64_t>(seq) * p.a.heads.n_head_kv + kv;
  const int n = p.a.pages.n_tokens[seq] / NARROWS_CUDA_PAGE * NARROWS_CUDA_PAGE;
  const uint32_t budget = static_cast<uint32_t>(max(0, min(p.a.pages.budget[seq], p.a.pages.max_budget)));
  const int64_t first_head = static_cast<int64_t>(seq) * p.a.heads.n_head + kv * group;

  // A warp a head: what its scores are to be divided by.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < group) {
    const float2* totals = p.at<const float2>(p.plan.totals) + (first_head + warp) * p.plan.n_chunk;
    const char* exact = p.at<const char>(p.plan.exact) + (first_head + warp) * (p.a.heads.head_dim + 4) * 4;
    float2 all = lane == 0 ? *reinterpret_cast<const float2*>(exact) : make_float2(-INFINITY, 0);
    for (int i = lane; i < p.plan.n_chunk; i += 32) {
      const float2 x = totals[i];
      const float most = fmaxf(all.x, x.x), base = most == -INFINITY ? 0.0F : most;
      all = make_float2(most, all.y * power2(all.x - base) + x.y * power2(x.x - base));
    }
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const float2 x = make_float2(__shfl_xor_sync(~0U, all.x, i), __shfl_xor_sync(~0U, all.y, i));
      const float most = fmaxf(all.x, x.x), base = most == -INFINITY ? 0.0F : most;
      all = make_float2(most, all.y * power2(all.x - base) + x.y * power2(x.x - base));
    }
    if (lane == 0) {
      top[warp] = all.x == -INFINITY ? 0.0F : all.x;
      factor[warp] = all.y > 0 ? 1 / all.y : 0.0F;
    }
  }
  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) s.hist[i] = 0;
  for (int i = threadIdx.x; i < 256; i += kSelectThreads) s.mass[i] = 0;
  if (threadIdx.x == 0) s.total = 0;
  __syncthreads();

  const int64_t ld =
      static_cast<int64_t>(p.a.pages.n_max + NARROWS_CUDA_PAGE - 1) / NARROWS_CUDA_PAGE * NARROWS_CUDA_PAGE;
  float* scores = p.at<float>(p.plan.scores) + first_head * ld;
  uint32_t* keys = in_shared != 0 ? dynamic : reinterpret_cast<uint32_t*>(scores);
  uint32_t* used = in_shared != 0 ? dynamic + ld : dynamic;
  const float may_lose = (1 - p.a.mass) * static_cast<float>(group);
  const float floor = may_lose / static_cast<float>(max(1, n));
  const KltBin bin;
  uint32_t candidates = 0;
  constexpr int kAhead = 4;
  for (int base = threadIdx.x; base < n; base += kAhead * kSelectThreads) {
    float pooled[kAhead] = {};
    bool never[kAhead] = {};
    for (int h = 0; h < group; ++h) {
      float x[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int t = base + k * kSelectThreads;
        x[k] = t < n ? __ldcg(&scores[h * ld + t]) : 0.0F;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        never[k] = never[k] || !(x[k] > -INFINITY);  // an anchor
        pooled[k] += power2(x[k] - top[h]) * factor[h];
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int t = base + k * kSelectThreads;
      if (t >= n) break;
      const uint32_t key = never[k] || !(pooled[k] >= floor) ? 0U : max(1U, __float_as_uint(pooled[k]));
      keys[t] = key;
      if (key == 0) continue;
      ++candidates;
      const uint32_t b = bin(key);
      atomicAdd(&s.hist[b], 1U);
      if (p.a.mass < 1) atomicAdd(&s.mass[b / 16], __float2uint_rn(fminf(pooled[k], 8.0F) * kMassUnit));
    }
  }
  // What was dropped counts as attention in the pages too, but is less than what may be lost: sums are of
  // candidates.
  candidates = __reduce_add_sync(~0U, candidates);
  if (lane == 0) atomicAdd(&s.total, candidates);
  __syncthreads();
  candidates = s.total;

  // The highest threshold, on a grid of an eighth of an octave, that holds what is wanted.
  __shared__ uint32_t mass_key;
  if (p.a.mass < 1) {
    if (threadIdx.x == 0) {
      float in_pages = 0;
      for (int h = 0; h < group; ++h) {
        const char* exact = p.at<const char>(p.plan.exact) + (first_head + h) * (p.a.heads.head_dim + 4) * 4;
        const float2 e = *reinterpret_cast<const float2*>(exact);
        in_pages += 1 - (e.y > 0 ? e.y * power2(e.x - top[h]) * factor[h] : 0.0F);
      }
      const float wanted = n > 0 ? in_pages - may_lose : 0.0F;
      uint32_t key = 0;
      float sum = 0;
      if (!(wanted > 0)) {
        key = ~0U;
      } else {
        for (int i = 255; i > 0 && key == 0; --i) {
          sum += static_cast<float>(s.mass[i]) / kMassUnit;
          if (sum >= wanted) key = kLowKey + ((static_cast<uint32_t>(i) * 16 - 1) << 16);
        }
      }
      mass_key = key;
    }
    __syncthreads();
  } else {
    if (threadIdx.x == 0) mass_key = 0;
    __syncthreads();
  }

  Threshold threshold{0, 0};
  uint32_t count = candidates;
  if (mass_key != 0) {
    // As many as are in the bins from it on.
    uint32_t own = 0;
    for (int i = threadIdx.x; i < kBins; i += kSelectThreads) {
      if (mass_key != ~0U && i >= static_cast<int>(bin(mass_key))) own += s.hist[i];
    }
    scan_block(own, s.warp, &count);
    threshold = {mass_key == ~0U ? ~0U : mass_key - 1, 0};
  }
  if (count > budget) threshold = budget > 0 ? find_threshold(s, keys, n, budget, bin) : Threshold{~0U, 0};
  __syncthreads();
  int32_t* selected = p.at<int32_t>(p.plan.at.selected) + list * p.a.pages.max_budget;
  const uint32_t n_selected = take(s, keys, n, threshold, selected, budget);
  __syncthreads();
  const auto& kept = p.a.kept;
  const uint32_t n_missing = hold(
      s, selected, n_selected, p.at<uint16_t>(p.plan.at.slot) + list * p.a.pages.max_budget,
      p.at<int32_t>(p.plan.at.missing) + list * p.a.pages.max_budget, kept.token_of + list * kept.capacity,
      kept.slot_of + list * kept.ld, kept.hand + list, kept.capacity, used);
  if (threadIdx.x == 0) {
    p.at<uint32_t>(p.plan.at.n_selected)[list] = n_selected;
    p.at<uint32_t>(p.plan.at.n_missing)[list] = n_missing;
  }
}

/// Keys in shared memory up to this many tokens: the most that every target has beside the histograms.
constexpr int kSharedTokens = 17408;

}  // namespace

int launch_klt_select(const KltParams& p, cudaStream_t stream) {
  const int n = (p.a.pages.n_max + NARROWS_CUDA_PAGE - 1) / NARROWS_CUDA_PAGE * NARROWS_CUDA_PAGE;
  const int in_shared = n <= kSharedTokens ? 1 : 0;
  const int bytes = (in_shared != 0 ? n * 4 : 0) + (p.a.kept.capacity + 31) / 32 * 4;
  if (cudaFuncSetAttribute(klt_select, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched();
  const dim3 grid(static_cast<unsigned>(p.a.heads.n_head_kv), static_cast<unsigned>(p.a.heads.n_seq));
  klt_select<<<grid, kSelectThreads, static_cast<size_t>(bytes), stream>>>(p, in_shared);
  return launched();
}

}  // namespace narrows::cuda
