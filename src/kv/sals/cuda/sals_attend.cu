// Stage 4 of a SALS step on the device: softmax over the selected tokens (products already known, or rows of
// kept keys) and the exact ones, values unpacked in registers; the last block of a KV head merges all shares.
// A lane has 4 values of a token. Bound: head_dim bits / 8 + 4 head_dim / 32 bytes a selected token and KV
// head (and 2 head_dim with kept keys) from memory.
#include "exec/cuda/launch.h"
#include "kv/sals/cuda/sals_common.cuh"

namespace narrows::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

struct AttendShared {
  int room, token, score, values, value_bytes, rows,
      bytes;  ///< values [room]: of this head, codes then params
  __host__ __device__ AttendShared(int max_budget, int n_split, int group, int head_dim, int bits) {
    room = ((max_budget + n_split - 1) / n_split + 15) / 16 * 16 + 16;
    value_bytes = head_dim * bits / 8 + (bits < 16 ? head_dim / 8 : 0);
    token = kTileHeads * head_dim * 2;  // behind the query
    score = token + room * 4;
    values = (score + group * room * 4 + 15) / 16 * 16;
    rows = values + room * value_bytes;
    bytes = rows + 2 * kWarps * group * (head_dim + 4) * 4;
  }
};

/// Four values of a token: value_bits 2: i, i + 8, i + 16, i + 24 of a group; 4: 2 i, 2 i + 1 and those 16
/// on.
template <int kBits>
__device__ inline void unpack4(uint32_t code, float2 params, float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t x = kBits == 2 ? code >> 2 * i & 3 : code >> (i % 2 * 8 + i / 2 * 4) & 15;
    v[i] = params.y + params.x * static_cast<float>(x);
  }
}

/// Where value i of a lane is in the head.
template <int kBits>
__device__ inline int place_of(int lane, int i) {
  return kBits == 2 ? lane / 8 * 32 + lane % 8 + 8 * i : lane / 8 * 32 + 2 * (lane % 8) + i % 2 + i / 2 * 16;
}

/// kGroup: query heads of a KV head at most.
template <int HD, int kBits, int kGroup>
__global__ __launch_bounds__(kThreads, 4) void sals_attend(const __grid_constant__ SalsParams p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ float top_of[kWarps][kTileHeads], sum_of[kWarps][kTileHeads];
  __shared__ bool is_last;
  const int split = blockIdx.x, kv = blockIdx.y, seq = blockIdx.z, group = p.plan.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const auto& heads = p.a.heads;
  const int first_head = kv * group, width = heads.n_head_kv * HD;
  const AttendShared at(p.a.pages.max_budget, p.plan.n_split, group, HD, kBits);
  auto* q = reinterpret_cast<__half*>(shared);
  auto* token = reinterpret_cast<int32_t*>(shared + at.token);
  auto* score = reinterpret_cast<float*>(shared + at.score);
  auto* rows = reinterpret_cast<StateRow<HD>*>(shared + at.rows);  // [2 kWarps][group]
  const float scale2 = heads.scale * kLog2e;
  const int64_t n_all = p.at<const uint32_t>(p.plan.at.n_selected)[seq];
  const int begin = static_cast<int>(n_all * split / p.plan.n_split);
  const int n = static_cast<int>(n_all * (split + 1) / p.plan.n_split) - begin;
  const int64_t list = static_cast<int64_t>(seq) * p.a.pages.max_budget;
  const bool keeps = p.a.kept.keys != nullptr;

  const float* rope = p.a.pages.rope + static_cast<int64_t>(p.a.pages.position[seq]) * HD;
  for (int i = threadIdx.x; i < group * HD / 2; i += kThreads) {
    const int h = i / (HD / 2), pair = i % (HD / 2);
    const __half* from = static_cast<const __half*>(heads.q) + seq * heads.q_stride + (first_head + h) * HD;
    const float2 turn = *reinterpret_cast<const float2*>(rope + 2 * pair);
    const float x = __half2float(from[pair]), y = __half2float(from[pair + HD / 2]);
    q[h * HD + pair] = __float2half_rn(x * turn.x - y * turn.y);
    q[h * HD + pair + HD / 2] = __float2half_rn(x * turn.y + y * turn.x);
  }
  for (int i = threadIdx.x; i < n; i += kThreads)
    token[i] = p.at<const int32_t>(p.plan.at.selected)[list + begin + i];
  if (!keeps) {
    for (int h = 0; h < group; ++h) {
      constexpr int kShares = HD / 64;  // as sals_rebuild() wrote them
      const float* from =
          p.at<const float>(p.plan.logits) +
          (static_cast<int64_t>(seq) * heads.n_head + first_head + h) * kShares * p.a.pages.max_budget +
          begin;
      for (int i = threadIdx.x; i < n; i += kThreads) {
        float x = from[i];
        if constexpr (kShares == 2) x += from[p.a.pages.max_budget + i];
        score[h * at.room + i] = x * scale2;
      }
    }
  }
  __syncthreads();
  // Values are on their way while keys are scored.
  constexpr int kCodeBytes = HD * kBits / 8, kParamBytes = kBits < 16 ? HD / 8 : 0;
  constexpr int kStep = kParamBytes == 8 ? 8 : 16, kChunks = (kCodeBytes + kParamBytes) / kStep;
  char* values = shared + at.values;
  for (int i = threadIdx.x; i < n * kChunks; i += kThreads) {
    const int k = i / kChunks, byte = i % kChunks * kStep, t = token[k], in_page = t % NARROWS_CUDA_PAGE;
    const uint8_t* page = sals_page(p, seq, t / NARROWS_CUDA_PAGE);
    const uint8_t* from = byte < kCodeBytes
                              ? page + p.a.codes_offset +
                                    (static_cast<int64_t>(in_page) * heads.n_head_kv + kv) * kCodeBytes + byte
                              : page + p.a.params_offset +
                                    (static_cast<int64_t>(in_page) * heads.n_head_kv + kv) * kParamBytes +
                                    byte - kCodeBytes;
    if constexpr (kStep == 16)
      copy_async(values + k * at.value_bytes + byte, from);
    else
      copy_async8(values + k * at.value_bytes + byte, from);
  }
  commit_copies();
  QueryFragments<HD> fragments;
  fragments.load(q, group);
  if (keeps) {
    const uint16_t* slot = p.at<const uint16_t>(p.plan.at.slot) + list + begin;
    const __half* keys = static_cast<const __half*>(p.a.kept.keys) +
                         static_cast<int64_t>(seq) * p.a.kept.capacity * width + kv * HD;
    for (int t = warp; t * 16 < n; t += kWarps) {
      const int i0 = t * 16 + g, i1 = i0 + 8;
      float s[4];
      score_tile<HD>(fragments, keys + static_cast<int64_t>(slot[min(i0, n - 1)]) * width,
                     keys + static_cast<int64_t>(slot[min(i1, n - 1)]) * width, i0 < n, i1 < n, s);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = j < 2 ? i0 : i1, h = 2 * c + j % 2;
        if (i < n && h < group) score[h * at.room + i] = s[j] * scale2;
      }
    }
    __syncthreads();
  }

  // The exact tokens, in flash's way.
  {
    FlashState<HD> state;
    const auto& exact = p.a.pages.exact;
    const int64_t half_block = static_cast<int64_t>(heads.n_head_kv) * NARROWS_CUDA_BLOCK * HD;
    const int n_exact = p.a.pages.n_exact[seq];
    for (int b = split * kWarps + warp; b < n_exact; b += kWarps * p.plan.n_split) {
      const int64_t i = static_cast<int64_t>(seq) * exact.ld + b;
      const __half* k = static_cast<const __half*>(exact.pool) + exact.table[i] * 2 * half_block +
                        static_cast<int64_t>(kv) * NARROWS_CUDA_BLOCK * HD;
      attend_tile<HD>(state, fragments, k, k + half_block, 0, p.a.pages.exact_count[i], scale2);
    }
    write_state<HD>(state, rows + warp * group, group);
  }

  for (int h = 0; h < group; ++h) {
    float top = -INFINITY;
    for (int i = threadIdx.x; i < n; i += kThreads) top = fmaxf(top, score[h * at.room + i]);
#pragma unroll
    for (int i = 1; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0U, top, i));
    if (lane == 0) top_of[warp][h] = top;
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
  __syncthreads();

  wait_copies<0>();
  __syncthreads();
  // Values: a warp takes tokens in turn, 32 / kLanes at a time.
  constexpr int kLanes = HD / 4, kTokens = 32 / kLanes;
  const int sub = lane / kLanes, own = lane % kLanes;
  float acc[kGroup][4] = {};
  constexpr int kUnroll = 4;
  for (int i = warp * kTokens * kUnroll; i < n; i += kWarps * kTokens * kUnroll) {
    float v[kUnroll][4];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const char* row = values + min(i + u * kTokens + sub, n - 1) * at.value_bytes;
      if constexpr (kBits == 16) {
        const uint2 x = *reinterpret_cast<const uint2*>(row + own * 8);
        const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&x.x));
        const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&x.y));
        v[u][0] = low.x, v[u][1] = low.y, v[u][2] = high.x, v[u][3] = high.y;
      } else {
        const uint32_t code = kBits == 2 ? *reinterpret_cast<const uint8_t*>(row + own)
                                         : *reinterpret_cast<const uint16_t*>(row + own * 2);
        const float2 params =
            __half22float2(*reinterpret_cast<const __half2*>(row + kCodeBytes + own / 8 * 4));
        unpack4<kBits>(code, params, v[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = i + u * kTokens + sub;
#pragma unroll
      for (int h = 0; h < kGroup; ++h) {
        if (h >= group) break;
        const float w = k < n ? score[h * at.room + k] : 0.0F;
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[h][j] += w * v[u][j];
      }
    }
  }
  StateRow<HD>* sums = rows + kWarps * group;
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {
    if (h >= group) break;
    float top = -INFINITY;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, top_of[w][h]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float x = acc[h][j];
      if constexpr (kTokens == 2) x += __shfl_xor_sync(~0U, x, 16);
      const int d = kBits == 16 ? own * 4 + j : place_of < kBits == 16 ? 2 : kBits > (own, j);
      if (sub == 0) sums[warp * group + h].o[d] = x;
    }
    if (lane == 0) {
      sums[warp * group + h].m = n > 0 ? top : -INFINITY;
      sums[warp * group + h].l = sum_of[warp][h];
    }
  }
  __syncthreads();

  auto* states = p.at<StateRow<HD>>(p.plan.states) +
                 (static_cast<int64_t>(seq) * heads.n_head + first_head) * p.plan.n_split;
  auto* out = static_cast<__half*>(heads.out) + seq * heads.out_stride + first_head * HD;
  for (int i = threadIdx.x; i < group * HD; i += kThreads) {
    const int h = i / HD, d = i % HD;
    float top = -INFINITY;
    for (int w = 0; w < 2 * kWarps; ++w) top = fmaxf(top, rows[w * group + h].m);
    float l = 0, o = 0;
    for (int w = 0; w < 2 * kWarps && top > -INFINITY; ++w) {
      const StateRow<HD>& from = rows[w * group + h];
      if (from.m == -INFINITY) continue;
      const float weight = power2(from.m - top);
      l += weight * from.l;
      o += weight * from.o[d];
    }
    if (p.plan.n_split == 1) {
      out[h * HD + d] = __float2half_rn(l > 0 ? o / l : 0.0F);
    } else {
      StateRow<HD>& to = states[static_cast<int64_t>(h) * p.plan.n_split + split];
      to.o[d] = o;
      if (d == 0) to.m = top;
      if (d == 0) to.l = l;
    }
  }
  if (p.plan.n_split == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = p.at<uint32_t>(p.plan.counter) + static_cast<int64_t>(seq) * heads.n_head_kv + kv;
    is_last = atomicAdd(counter, 1U) == static_cast<uint32_t>(p.plan.n_split) - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < group * HD; i += kThreads) {
    const int h = i / HD, d = i % HD;
    const StateRow<HD>* from = states + static_cast<int64_t>(h) * p.plan.n_split;
    float top = -INFINITY;
    for (int s = 0; s < p.plan.n_split; ++s) top = fmaxf(top, __ldcg(&from[s].m));
    float l = 0, o = 0;
    for (int s = 0; s < p.plan.n_split && top > -INFINITY; ++s) {
      const float weight = power2(__ldcg(&from[s].m) - top);
      l += weight * __ldcg(&from[s].l);
      o += weight * __ldcg(&from[s].o[d]);
    }
    out[h * HD + d] = __float2half_rn(l > 0 ? o / l : 0.0F);
  }
}

template <int HD, int kBits, int kGroup>
int launch(const SalsParams& p, cudaStream_t stream) {
  const AttendShared at(p.a.pages.max_budget, p.plan.n_split, p.plan.group, HD, kBits);
  const auto kernel = sals_attend<HD, kBits, kGroup>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes) != cudaSuccess)
    return launched();
  const dim3 grid(static_cast<unsigned>(p.plan.n_split), static_cast<unsigned>(p.a.heads.n_head_kv),
                  static_cast<unsigned>(p.a.heads.n_seq));
  kernel<<<grid, kThreads, static_cast<size_t>(at.bytes), stream>>>(p);
  return launched();
}

template <int HD, int kBits>
int by_group(const SalsParams& p, cudaStream_t stream) {
  if (p.plan.group == 1) return launch<HD, kBits, 1>(p, stream);
  if (p.plan.group <= 4) return launch<HD, kBits, 4>(p, stream);
  return launch<HD, kBits, 8>(p, stream);
}

template <int HD>
int by_bits(const SalsParams& p, cudaStream_t stream) {
  if (p.a.value_bits == 2) return by_group<HD, 2>(p, stream);
  if (p.a.value_bits == 4) return by_group<HD, 4>(p, stream);
  return by_group<HD, 16>(p, stream);
}

}  // namespace

int launch_sals_select(const SalsParams& p, cudaStream_t stream);
int launch_sals_rebuild(const SalsParams& p, cudaStream_t stream);

int launch_sals(const narrows_cuda_sals_args& args, const SalsPlan& plan, void* workspace,
                cudaStream_t stream) {
  const SalsParams p{args, plan, static_cast<char*>(workspace)};
  if (const int status = launch_sals_select(p, stream); status != NARROWS_CUDA_OK) return status;
  if (const int status = launch_sals_rebuild(p, stream); status != NARROWS_CUDA_OK) return status;
  return args.heads.head_dim == 64 ? by_bits<64>(p, stream) : by_bits<128>(p, stream);
}

}  // namespace narrows::cuda
