// Stage 2 of a klt step on the device: scores to probabilities over the whole cache, summed over the query
// heads of a KV head, the tokens that `budget` and `mass` ask for (exactly, as klt_select.cpp finds them),
// and their rows among the kept keys. Two kernels of many blocks a list: a histogram of probabilities decides
// most of it, and few tokens are compared with each other.
#include "exec/cuda/choose.cuh"
#include "exec/cuda/launch.h"
#include "kv/klt/cuda/klt_common.cuh"

namespace narrows::cuda {

namespace {

/// Blocks an SM: with two, compute capability 12 spills.
#if __CUDA_ARCH__ >= 1000
constexpr int kBlocksOfSelect = 1;
#else
constexpr int kBlocksOfSelect = 2;
#endif

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

__device__ inline int64_t ld_of(const KltParams& p) {
  return static_cast<int64_t>(p.a.pages.n_max + NARROWS_CUDA_PAGE - 1) / NARROWS_CUDA_PAGE *
         NARROWS_CUDA_PAGE;
}

__device__ inline uint32_t budget_of(const KltParams& p, int seq) {
  return static_cast<uint32_t>(max(0, min(p.a.pages.budget[seq], p.a.pages.max_budget)));
}

/// Keys take the place of the scores of the KV head's first query head.
__device__ inline ChooseList list_of(const KltParams& p, int seq, int kv) {
  const int64_t list = static_cast<int64_t>(seq) * p.a.heads.n_head_kv + kv, ld = ld_of(p);
  return {
      p.at<Decision>(p.plan.decision) + list,
      p.at<uint32_t>(p.plan.scores) + (static_cast<int64_t>(seq) * p.a.heads.n_head + kv * p.plan.group) * ld,
      p.at<uint32_t>(p.plan.taken) + list * (ld / 32), p.at<uint2>(p.plan.few) + list * kFew,
      p.at<uint16_t>(p.plan.rows) + list * p.a.pages.max_budget};
}

/// Sum of x over this thread and lower ones of the first 256; in doubles, which hold sums of such integers
/// exactly.
__device__ inline double scan_mass(double x, double* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const double other = __shfl_up_sync(~0U, x, i);
    if (lane >= i) x += other;
  }
  if (lane == 31) warp_sums[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += warp_sums[w];
  return x;
}

/// What to do with each bin: budget and mass against the histograms. One block.
__device__ Decision decide(SelectShared& s, float wanted, bool by_mass, uint32_t budget) {
  __shared__ int32_t mass_bin;  // taken from this one on
  __shared__ double sums[kSelectWarps];
  if (threadIdx.x == 0) mass_bin = !by_mass || wanted > 0 ? 0 : kBins;
  __syncthreads();
  if (by_mass && wanted > 0) {
    // The highest threshold, on a grid of an eighth of an octave, that holds what is wanted.
    const int i = 255 - static_cast<int>(threadIdx.x);
    const double own = i > 0 ? static_cast<double>(s.mass[i]) / kMassUnit : 0.0;
    const double sum = scan_mass(own, sums);
    if (i > 0 && sum >= wanted && sum - own < wanted) mass_bin = i * 16;
  }
  __syncthreads();
  uint32_t own = 0, count = 0;
  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) {
    if (i >= mass_bin) own += s.hist[i];
  }
  scan_block(own, s.warp, &count);
  if (budget == 0) return {kBins, 0, 0, 0};
  if (count <= budget) return {mass_bin - 1, 0, 0, 0};
  find_bin<kBins>(s, budget);
  return {static_cast<int32_t>(s.found), budget - s.above, 0, 0};
}

/// The selection of a list whose tokens are marked, and its rows among the kept keys. One block.
__device__ void finish(const KltParams& p, SelectShared& s, const ChooseList& from, const Decision& decision,
                       int seq, int64_t list, int n, uint32_t* used) {
  int32_t* selected = p.at<int32_t>(p.plan.at.selected) + list * p.a.pages.max_budget;
  const uint32_t n_few = __ldcg(&from.decision->n_few);
  uint32_t n_selected = 0;
  if (n_few > kFew) {
    const Threshold t =
        by_digits(s, from.keys, n, decision.want, static_cast<uint32_t>(decision.first), KltBin{});
    n_selected = take(s, from.keys, n, t, selected, budget_of(p, seq));
  } else {
    if (n_few > 0) rank_few(s, from, n_few, decision.want);
    const int n_word = n / 32;
    const auto to = [&](uint32_t at, int t) { selected[at] = t; };
    if (n_word <= kBins) {
      for (int i = threadIdx.x; i < n_word; i += kSelectThreads) s.hist[i] = __ldcg(from.taken + i);
      __syncthreads();
      n_selected = expand(
          s, n, [&](int i) { return s.hist[i]; }, to);
    } else {
      n_selected = expand(
          s, n, [&](int i) { return __ldcg(from.taken + i); }, to);
    }
  }
  __syncthreads();
  const auto& kept = p.a.kept;
  const uint32_t n_missing =
      keep(s, selected, n_selected, p.at<uint16_t>(p.plan.at.slot) + list * p.a.pages.max_budget,
           p.at<int32_t>(p.plan.at.missing) + list * p.a.pages.max_budget, from.rows,
           kept.token_of + list * kept.capacity, kept.slot_of + list * kept.ld, kept.hand + list,
           kept.capacity, used);
  if (threadIdx.x == 0) {
    p.at<uint32_t>(p.plan.at.n_selected)[list] = n_selected;
    p.at<uint32_t>(p.plan.at.n_missing)[list] = n_missing;
  }
}

/// Scores of a list's share of tokens to probabilities, pooled; their keys and a histogram of them. The block
/// that comes last of a list decides; where a list has one block, that one does all.
__global__ __launch_bounds__(kSelectThreads,
                             kBlocksOfSelect) void klt_pool(const __grid_constant__ KltParams p,
                                                            const int share) {
  extern __shared__ __align__(16) uint32_t used[];
  __shared__ SelectShared s;
  __shared__ float top[kTileHeads], factor[kTileHeads];
  const int kv = blockIdx.y, seq = blockIdx.z, group = p.plan.group;
  const int64_t list = static_cast<int64_t>(seq) * p.a.heads.n_head_kv + kv;
  const int n = p.a.pages.n_tokens[seq] / NARROWS_CUDA_PAGE * NARROWS_CUDA_PAGE;
  const int64_t first_head = static_cast<int64_t>(seq) * p.a.heads.n_head + kv * group;
  const int begin = static_cast<int>(blockIdx.x) * share, end = min(n, begin + share);
  const char* exact = p.at<const char>(p.plan.exact) + first_head * (p.a.heads.head_dim + 4) * 4;
  const int64_t ld_exact = (p.a.heads.head_dim + 4) * 4;

  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) s.hist[i] = 0;
  for (int i = threadIdx.x; i < 256; i += kSelectThreads) s.mass[i] = 0;
  let_next_begin();
  after_previous();

  // A warp a head: what its scores are to be divided by.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < group) {
    const float2* totals = p.at<const float2>(p.plan.totals) + (first_head + warp) * p.plan.n_chunk;
    float2 all =
        lane == 0 ? *reinterpret_cast<const float2*>(exact + warp * ld_exact) : make_float2(-INFINITY, 0);
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
  __syncthreads();

  const int64_t ld = ld_of(p);
  float* scores = p.at<float>(p.plan.scores) + first_head * ld;
  const ChooseList to = list_of(p, seq, kv);
  const bool by_mass = p.a.mass < 1;
  const float may_lose = (1 - p.a.mass) * static_cast<float>(group);
  const float floor = may_lose / static_cast<float>(max(1, n));
  const KltBin bin;
  uint32_t* hist = p.at<uint32_t>(p.plan.hist) + list * kKltHistogram;
  for (int t = begin + 4 * static_cast<int>(threadIdx.x); t < end; t += 4 * kSelectThreads) {
    float pooled[4] = {};
    bool never[4] = {};
#pragma unroll 4
    for (int h = 0; h < group; ++h) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(scores + h * ld + t));
      const float each[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        never[k] = never[k] || !(each[k] > -INFINITY);  // an anchor
        pooled[k] += power2(each[k] - top[h]) * factor[h];
      }
    }
    uint32_t key[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      key[k] = never[k] || !(pooled[k] >= floor) ? 0U : max(1U, __float_as_uint(pooled[k]));
      if (key[k] == 0) continue;
      const uint32_t b = bin(key[k]);
      atomicAdd(&s.hist[b], 1U);
      if (by_mass) atomicAdd(&s.mass[b / 16], __float2uint_rn(fminf(pooled[k], 8.0F) * kMassUnit));
    }
    __stcg(reinterpret_cast<uint4*>(to.keys + t), make_uint4(key[0], key[1], key[2], key[3]));
  }
  const bool is_alone = gridDim.x == 1;
  __syncthreads();
  if (!is_alone) {
    for (int i = threadIdx.x; i < kKltHistogram && begin < end; i += kSelectThreads) {
      const uint32_t own = i < kBins ? s.hist[i] : s.mass[i - kBins];
      if (own != 0) atomicAdd(hist + i, own);
    }
    if (!is_last_of(p.at<uint32_t>(p.plan.counter) + list, gridDim.x)) return;
    for (int i = threadIdx.x; i < kKltHistogram; i += kSelectThreads)
      (i < kBins ? s.hist[i] : s.mass[i - kBins]) = __ldcg(hist + i);
    __syncthreads();
  }

  // What was dropped counts as attention in the pages too, but is less than what may be lost: sums are of
  // candidates.
  float in_pages = 0;
  for (int h = 0; h < group; ++h) {
    const float2 e = *reinterpret_cast<const float2*>(exact + h * ld_exact);
    in_pages += 1 - (e.y > 0 ? e.y * power2(e.x - top[h]) * factor[h] : 0.0F);
  }
  const Decision decision = decide(s, n > 0 ? in_pages - may_lose : 0.0F, by_mass, budget_of(p, seq));
  if (threadIdx.x == 0) *to.decision = decision;
  if (!is_alone) return;
  __syncthreads();
  mark(to, decision, 0, n, bin);
  __syncthreads();
  finish(p, s, to, decision, seq, list, n, used);
}

/// What was decided, token by token; the block that comes last of a list finishes it.
__global__ __launch_bounds__(kSelectThreads,
                             kBlocksOfSelect) void klt_choose(const __grid_constant__ KltParams p,
                                                              const int share) {
  extern __shared__ __align__(16) uint32_t used[];
  __shared__ SelectShared s;
  const int kv = blockIdx.y, seq = blockIdx.z;
  const int64_t list = static_cast<int64_t>(seq) * p.a.heads.n_head_kv + kv;
  const int n = p.a.pages.n_tokens[seq] / NARROWS_CUDA_PAGE * NARROWS_CUDA_PAGE;
  const ChooseList from = list_of(p, seq, kv);
  let_next_begin();
  after_previous();
  const Decision decision = *from.decision;
  const int begin = static_cast<int>(blockIdx.x) * share;
  mark(from, decision, begin, min(n, begin + share), KltBin{});
  if (!is_last_of(p.at<uint32_t>(p.plan.counter) + list, gridDim.x)) return;
  finish(p, s, from, decision, seq, list, n, used);
}

}  // namespace

int launch_klt_select(const KltParams& p, cudaStream_t stream) {
  // A block has a round of its threads' tokens at least. Short lists, and lists that are as many as the
  // device has room for, have one block, which spares them a kernel.
  constexpr int kRound = 4 * kSelectThreads, kShort = 4;
  const int n_round = (p.a.pages.n_max + kRound - 1) / kRound, n_list = p.a.heads.n_head_kv * p.a.heads.n_seq;
  const int room = 2 * p.plan.n_sm / n_list;
  const int n_block = n_round <= kShort || room < 2 ? 1 : room < n_round ? room : n_round;
  const int share = (n_round + n_block - 1) / n_block * kRound;
  const dim3 grid(static_cast<unsigned>((p.a.pages.n_max + share - 1) / share),
                  static_cast<unsigned>(p.a.heads.n_head_kv), static_cast<unsigned>(p.a.heads.n_seq));
  const int bytes = (p.a.kept.capacity + 31) / 32 * 4;
  if (const int status = launch_early(klt_pool, grid, kSelectThreads, bytes, stream, p, share);
      status != NARROWS_CUDA_OK || grid.x == 1)
    return status;
  return launch_early(klt_choose, grid, kSelectThreads, bytes, stream, p, share);
}

}  // namespace narrows::cuda
