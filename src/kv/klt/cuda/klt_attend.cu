// Stage 4 of a klt step on the device: all selected keys, which are kept by now, are scored, and weighted
// sums of VALUE LATENTS added up from their bit planes; then a block a query head merges all shares with
// the exact tokens' and applies the inverse transform of the values once.
//
// A warp takes tokens in turn, a lane an octet of their value latents: planes arrive in shared memory while
// keys are scored, codes are put together in registers and added up in float32. Amplitudes stay in registers
// for the tokens of a page. Bound: 2 head_dim + row bytes a selected token and KV head from memory; 7
// operations an octet and plane, 2 + group a coordinate.
#include "exec/cuda/launch.h"
#include "kv/klt/cuda/klt_common.cuh"

namespace narrows::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
/// Coordinates of a part at most.
constexpr int kWidest = 256;
/// Shared memory of a block: its tokens and their value planes, then what rebuilding and summing need in
/// turn.
struct AttendShared {
  int room;      ///< tokens of a share, and a tile more
  int selected;  ///< int32 [room]
  int slot;      ///< uint16 [room]
  int score;     ///< f32 [group][room]: scores, then weights
  int rows;      ///< value planes [room][stride]
  int common;
  int bytes;

  __host__ __device__ AttendShared(int max_budget, int n_split, int group, int most_planes) {
    room = ((max_budget + n_split - 1) / n_split + 15) / 16 * 16;
    selected = 0;
    slot = selected + room * 4;
    score = slot + room * 2;
    rows = (score + group * room * 4 + 15) / 16 * 16;
    common = rows + (room * most_planes + 15) / 16 * 16;
    bytes = common + kWarps * group * kWidest * 4;  // sums; the query before them
  }
};

/// Sums of this warp's tokens [begin, end) of the block's: acc [query head][coordinate of the lane's octet].
/// Values have kPlanes planes at most.
template <int kGroup, int kPlanes>
__device__ void sum_values(const KltParams& p, const narrows_cuda_klt_part& part, int seq,
                           const AttendShared& at, const char* shared, int begin, int end,
                           float (&acc)[kGroup][8]) {
  const int lane = threadIdx.x % 32;
  const auto* selected = reinterpret_cast<const int32_t*>(shared + at.selected);
  const auto* weight = reinterpret_cast<const float*>(shared + at.score);
  const auto* rows = reinterpret_cast<const uint8_t*>(shared + at.rows);
  const bool has = lane < part.n_value / 8;
  const int stride = part.value.stride, bits = has ? bits_of(part.value, lane) : 0;
  const float centre = centre_of(bits);
  int32_t offset[kPlanes];
  uint32_t mask[kPlanes];  // none of the planes that this octet does not have: what is read there belongs to
                           // others
#pragma unroll
  for (int j = 0; j < kPlanes; ++j) {
    offset[j] = j < bits ? part.value.offset[j] + lane : 0;
    mask[j] = j < bits ? 0x01010101U << (7 - j) : 0U;
  }
  const int scale_at = part.value_scale_at + (has ? lane * 8 : 0);
  const auto scales_of = [&](int i) {
    if (i >= end) return make_uint2(0, 0);
    return __ldg(
        reinterpret_cast<const uint2*>(klt_page(p, seq, selected[i] / NARROWS_CUDA_PAGE) + scale_at));
  };
  uint2 scales = scales_of(begin);
  for (int i = begin; i < end;) {
    // A run of tokens of one page.
    const int page = selected[i] / NARROWS_CUDA_PAGE;
    const bool same = i + lane < end && selected[i + lane] / NARROWS_CUDA_PAGE == page;
    const int stop = i + __popc(__ballot_sync(~0U, same));
    float unit[8], shift[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const uint32_t scale = (c < 4 ? scales.x : scales.y) >> c % 4 * 8 & 255;
      unit[c] = amplitude_of(static_cast<uint8_t>(scale)) / 64;
      shift[c] = -centre * unit[c];
    }
    scales = scales_of(stop);
#pragma unroll 2
    for (; i < stop; ++i) {
      const uint8_t* row = rows + i * stride;
      uint32_t x = 0, y = 0;
#pragma unroll
      for (int j = 0; j < kPlanes; ++j) {
        const uint32_t byte = row[offset[j]], spread = 0x00204081U << (7 - j);
        x |= (byte & 15) * spread & mask[j];
        y |= (byte >> 4) * spread & mask[j];
      }
      float z[8];
#pragma unroll
      for (int c = 0; c < 8; ++c)
        z[c] = static_cast<float>((c < 4 ? x : y) >> c % 4 * 8 & 255) * unit[c] + shift[c];
#pragma unroll
      for (int h = 0; h < kGroup; ++h) {
        if (h >= p.plan.group) break;
        const float w = weight[h * at.room + i];
#pragma unroll
        for (int c = 0; c < 8; ++c) acc[h][c] += w * z[c];
      }
    }
  }
}

/// kGroup: query heads of a KV head at most.
template <int HD, int kGroup>
__global__ __launch_bounds__(kThreads, kGroup <= 2 ? 3
                                       : kGroup <= 4
                                           ? 2
                                           : 1) void klt_attend(const __grid_constant__ KltParams p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ float top_of[kWarps][kTileHeads];
  __shared__ float sum_of[kWarps][kTileHeads];
  const int split = blockIdx.x, kv = blockIdx.y, seq = blockIdx.z, group = p.plan.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int64_t list = static_cast<int64_t>(seq) * p.a.heads.n_head_kv + kv;
  const int first_head = kv * group, hop = p.plan.heads_of_part;
  __shared__ narrows_cuda_klt_part part;
  fetch_part(part, p.a.parts[kv / hop]);
  const AttendShared at(p.a.pages.max_budget, p.plan.n_split, group, p.plan.most_planes);
  auto* selected = reinterpret_cast<int32_t*>(shared + at.selected);
  auto* slot = reinterpret_cast<uint16_t*>(shared + at.slot);
  auto* score = reinterpret_cast<float*>(shared + at.score);

  let_next_begin();
  // The query, rotated, where sums will be.
  auto* q = reinterpret_cast<__half*>(shared + at.common);
  const float* rope = p.a.pages.rope + static_cast<int64_t>(p.a.pages.position[seq]) * HD;
  for (int i = threadIdx.x; i < group * HD / 2; i += kThreads) {
    const int h = i / (HD / 2), pair = i % (HD / 2);
    const __half* from =
        static_cast<const __half*>(p.a.heads.q) + seq * p.a.heads.q_stride + (first_head + h) * HD;
    const float2 y = turned(from, rope, pair, HD / 2, 1.0F);
    q[h * HD + pair] = __float2half_rn(y.x);
    q[h * HD + pair + HD / 2] = __float2half_rn(y.y);
  }
  __syncthreads();
  QueryFragments<HD> fragments;
  fragments.load(q, group);
  __syncthreads();

  after_previous();
  const int64_t n_all = p.at<const uint32_t>(p.plan.at.n_selected)[list];
  const int begin = static_cast<int>(n_all * split / p.plan.n_split);
  const int n = static_cast<int>(n_all * (split + 1) / p.plan.n_split) - begin;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    selected[i] = p.at<const int32_t>(p.plan.at.selected)[list * p.a.pages.max_budget + begin + i];
    slot[i] = p.at<const uint16_t>(p.plan.at.slot)[list * p.a.pages.max_budget + begin + i];
  }
  __syncthreads();
  // Value planes are on their way while keys are scored.
  {
    const int stride = part.value.stride, step = stride % 16 == 0 ? 16 : 8, chunks = stride / step;
    char* rows = shared + at.rows;
    for (int i = threadIdx.x; i < n * chunks; i += kThreads) {
      const int t = i / chunks, token = selected[t];
      const uint8_t* from = klt_page(p, seq, token / NARROWS_CUDA_PAGE) + part.value.at +
                            token % NARROWS_CUDA_PAGE * stride + i % chunks * step;
      if (step == 16)
        copy_async(rows + t * stride + i % chunks * 16, from);
      else
        copy_async8(rows + t * stride + i % chunks * 8, from);
    }
    commit_copies();
  }
  const __half* keys = static_cast<const __half*>(p.a.kept.keys) + list * p.a.kept.capacity * HD;
  // Scores.
  float m[2] = {-INFINITY, -INFINITY};
  for (int t = warp; t * 16 < n; t += kWarps) {
    const int i0 = t * 16 + g, i1 = i0 + 8;
    float s[4];
    score_tile<HD>(fragments, keys + static_cast<int64_t>(slot[min(i0, n - 1)]) * HD,
                   keys + static_cast<int64_t>(slot[min(i1, n - 1)]) * HD, i0 < n, i1 < n, s);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = j < 2 ? i0 : i1, h = 2 * c + j % 2;
      if (i >= n || h >= group) continue;
      const float x = s[j] * p.a.heads.scale * kLog2e;
      score[h * at.room + i] = x;
      m[j % 2] = fmaxf(m[j % 2], x);
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    m[j] = max_rows(m[j]);
    if (g == 0) top_of[warp][2 * c + j] = m[j];
  }
  __syncthreads();
  for (int h = 0; h < group; ++h) {
    float top = top_of[0][h];
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, top_of[w][h]);
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const float x = power2(score[h * at.room + i] - top);
      score[h * at.room + i] = x;
      sum += x;
    }
#pragma unroll
    for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(~0U, sum, i);
    if (lane == 0) sum_of[warp][h] = sum;
  }
  wait_copies<0>();
  __syncthreads();

  {
    float acc[kGroup][8] = {};
    const int first = n * warp / kWarps, last = n * (warp + 1) / kWarps;
    if (part.value.n_plane <= 4)
      sum_values<kGroup, 4>(p, part, seq, at, shared, first, last, acc);
    else if (part.value.n_plane <= 6)
      sum_values<kGroup, 6>(p, part, seq, at, shared, first, last, acc);
    else
      sum_values<kGroup, 8>(p, part, seq, at, shared, first, last, acc);
    auto* sums =
        reinterpret_cast<float*>(shared + at.common) + warp * group * kWidest;  // [kWarps][group][kWidest]
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
      if (h >= group) break;
      auto* to = reinterpret_cast<float4*>(sums + h * kWidest + lane * 8);
      to[0] = make_float4(acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
      to[1] = make_float4(acc[h][4], acc[h][5], acc[h][6], acc[h][7]);
    }
  }
  __syncthreads();
  float* latents = p.at<float>(p.plan.latents) +
                   ((static_cast<int64_t>(seq) * p.a.heads.n_head + first_head) * p.plan.n_split + split) *
                       p.plan.ld_latent;
  auto* states = p.at<float2>(p.plan.states) +
                 (static_cast<int64_t>(seq) * p.a.heads.n_head + first_head) * p.plan.n_split;
  const int64_t ld_head = static_cast<int64_t>(p.plan.n_split) * p.plan.ld_latent;
  for (int i = threadIdx.x; i < group * part.n_value; i += kThreads) {
    const int h = i / part.n_value, coord = i % part.n_value;
    const float* sums = reinterpret_cast<const float*>(shared + at.common) + h * kWidest + coord;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w * group * kWidest];
    __stcg(&latents[h * ld_head + coord], n > 0 ? sum : 0.0F);
  }
  if (threadIdx.x < group) {
    float top = -INFINITY, sum = 0;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, top_of[w][threadIdx.x]);
    for (int w = 0; w < kWarps; ++w) sum += sum_of[w][threadIdx.x];
    __stcg(&states[threadIdx.x * p.plan.n_split + split],
           n > 0 ? make_float2(top, sum) : make_float2(-INFINITY, 0));
  }
}

/// The shares of a query head, merged with the exact tokens; value latents through the inverse transform
/// once.
template <int HD, int kMergeThreads>
__global__ __launch_bounds__(kMergeThreads, 1) void klt_merge(const __grid_constant__ KltParams p) {
  constexpr int kAcross = HD / 8;                   // threads of a row of the transform
  constexpr int kRows = kMergeThreads / kAcross;    // rows at a time
  constexpr int kEach = kWidest / kRows;            // rows of a thread at most
  constexpr int kHalves = kMergeThreads / kWidest;  // of the shares
  static_assert(kMergeThreads % kWidest == 0);
  __shared__ float weight[kMergeThreads], latent[kHalves][kWidest], shares[kRows][HD],
      of_warp[kMergeThreads / 32];
  const int head = blockIdx.x, seq = blockIdx.y, kv = head / p.plan.group, hop = p.plan.heads_of_part;
  const int lane = threadIdx.x % 32;
  const narrows_cuda_klt_part& part = p.a.parts[kv / hop];
  const int n_value = part.n_value, channel = kv % hop * HD, width = hop * HD;
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  // The transform does not wait for anything.
  uint4 rows[kEach];
  const __half* decode = static_cast<const __half*>(part.value_decode) + channel + across * 8;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = down + k * kRows;
    rows[k] = i < n_value ? __ldg(reinterpret_cast<const uint4*>(decode + static_cast<int64_t>(i) * width))
                          : make_uint4(0, 0, 0, 0);
  }
  let_next_begin();
  after_previous();
  const int64_t row = static_cast<int64_t>(seq) * p.a.heads.n_head + head;
  const auto& exact = p.at<const StateRow<HD>>(p.plan.exact)[row];
  const float2* states = p.at<const float2>(p.plan.states) + row * p.plan.n_split;
  const int warp = threadIdx.x / 32, n_split = p.plan.n_split;
  const auto over_block = [&](float x, auto join) {
#pragma unroll
    for (int i = 1; i < 32; i *= 2) x = join(x, __shfl_xor_sync(~0U, x, i));
    __syncthreads();
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    x = of_warp[0];
#pragma unroll
    for (int w = 1; w < kMergeThreads / 32; ++w) x = join(x, of_warp[w]);
    return x;
  };
  const int coord = static_cast<int>(threadIdx.x) % kWidest, half = static_cast<int>(threadIdx.x) / kWidest;
  float top = exact.m;
  for (int i = threadIdx.x; i < n_split; i += kMergeThreads) top = fmaxf(top, states[i].x);
  top = over_block(top, [](float x, float y) { return fmaxf(x, y); });
  const float* from = p.at<const float>(p.plan.latents) + row * n_split * p.plan.ld_latent + coord;
  float sum = 0, in_pages = 0;
  for (int first = 0; first < n_split; first += kMergeThreads) {
    const int i = first + static_cast<int>(threadIdx.x), end = min(kMergeThreads, n_split - first);
    const float2 own = i < n_split && top > -INFINITY ? states[i] : make_float2(-INFINITY, 0);
    const float w = own.x > -INFINITY ? power2(own.x - top) : 0.0F;
    weight[threadIdx.x] = w;
    in_pages += over_block(w * own.y, [](float x, float y) { return x + y; });
    if (coord < n_value) {
#pragma unroll 8
      for (int s = half; s < end; s += kHalves)
        sum += weight[s] * from[static_cast<int64_t>(first + s) * p.plan.ld_latent];
    }
    __syncthreads();
  }
  const float keep = top > -INFINITY ? power2(exact.m - top) : 0.0F;
  latent[half][coord] = sum;
  __syncthreads();
  float acc[8] = {};
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    float w = 0;
#pragma unroll
    for (int i = 0; i < kHalves; ++i) w += latent[i][down + k * kRows];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t word = word_of(rows[k], j);
      const float2 y = __half22float2(*reinterpret_cast<const __half2*>(&word));
      acc[2 * j] += w * y.x;
      acc[2 * j + 1] += w * y.y;
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) shares[down][across * 8 + j] = acc[j];
  __syncthreads();
  const float total = in_pages + keep * exact.l;
  auto* out = static_cast<__half*>(p.a.heads.out) + seq * p.a.heads.out_stride + head * HD;
  for (int d = threadIdx.x; d < HD; d += kMergeThreads) {
    float y = keep * exact.o[d] + in_pages * part.value_mean[channel + d];
#pragma unroll
    for (int r = 0; r < kRows; ++r) y += shares[r][d];
    out[d] = __float2half_rn(total > 0 ? y / total : 0.0F);
  }
}

template <int HD>
int launch(const KltParams& p, cudaStream_t stream) {
  const AttendShared at(p.a.pages.max_budget, p.plan.n_split, p.plan.group, p.plan.most_planes);
  const dim3 grid(static_cast<unsigned>(p.plan.n_split), static_cast<unsigned>(p.a.heads.n_head_kv),
                  static_cast<unsigned>(p.a.heads.n_seq));
  const auto go = [&](auto kernel) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes) != cudaSuccess)
      return launched();
    if (const int status = launch_early(kernel, grid, kThreads, at.bytes, stream, p);
        status != NARROWS_CUDA_OK)
      return status;
    // Many shares are added up by two threads a coordinate.
    const dim3 heads(static_cast<unsigned>(p.a.heads.n_head), grid.z);
    if (p.plan.n_split > 16)
      return launch_early(klt_merge<HD, 2 * kWidest>, heads, 2 * kWidest, 0, stream, p);
    return launch_early(klt_merge<HD, kWidest>, heads, kWidest, 0, stream, p);
  };
  switch (p.plan.columns) {
    case 1:
      return go(klt_attend<HD, 1>);
    case 2:
      return go(klt_attend<HD, 2>);
    case 4:
      return go(klt_attend<HD, 4>);
    default:
      return go(klt_attend<HD, 8>);
  }
}

}  // namespace

int launch_klt_score(const KltParams& p, cudaStream_t stream);
int launch_klt_select(const KltParams& p, cudaStream_t stream);
int launch_klt_rebuild(const KltParams& p, cudaStream_t stream);

int launch_klt(const narrows_cuda_klt_args& args, const KltPlan& plan, void* workspace, cudaStream_t stream) {
  const KltParams p{args, plan, static_cast<char*>(workspace)};
  if (const int status = launch_klt_score(p, stream); status != NARROWS_CUDA_OK) return status;
  if (const int status = launch_klt_select(p, stream); status != NARROWS_CUDA_OK) return status;
  if (const int status = launch_klt_rebuild(p, stream); status != NARROWS_CUDA_OK) return status;
  return args.heads.head_dim == 64 ? launch<64>(p, stream) : launch<128>(p, stream);
}

}  // namespace narrows::cuda
