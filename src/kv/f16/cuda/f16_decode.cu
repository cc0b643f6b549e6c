// Attention of a step to exact tokens. A block takes a share of a sequence's tokens for one KV head (up to 8
// of its query heads), its warps tiles of 16 tokens in turn; the last block of a KV head merges the shares.
// Bound: 4 head_dim bytes a token and KV head from device memory; all else hides behind that.
#include "exec/cuda/arguments.h"
#include "exec/cuda/flash_tile.cuh"
#include "exec/cuda/launch.h"

namespace narrows::cuda {

namespace {

constexpr int kWarps = 4;

struct F16Params {
  narrows_cuda_f16_args a;
  void* states;       ///< StateRow [n_seq, n_head, n_split]
  uint32_t* counter;  ///< [n_seq, n_head_kv, head groups]
  int n_split, group, n_chunk;
};

template <int HD>
__global__ __launch_bounds__(32 * kWarps,
                             HD <= 128 ? 4 : 2) void f16_decode(const __grid_constant__ F16Params p) {
  const int split = blockIdx.x, seq = blockIdx.z;
  const int kv = blockIdx.y / p.n_chunk, chunk = blockIdx.y % p.n_chunk;
  const int warp = threadIdx.x / 32;
  const int head = kv * p.group + chunk * kHeadsOfTile;
  const int n_head = min(kHeadsOfTile, p.group - chunk * kHeadsOfTile);
  let_next_begin();
  after_previous();
  const int n = p.a.n_tokens[seq];
  const int first = p.a.window > 0 ? max(0, n - p.a.window) : 0;
  const int first_tile = first / 16, n_tile = (n + 15) / 16 - first_tile;
  const int begin = static_cast<int>(static_cast<int64_t>(n_tile) * split / p.n_split);
  const int end = static_cast<int>(static_cast<int64_t>(n_tile) * (split + 1) / p.n_split);

  __shared__ __align__(16) StateRow<HD> rows[kWarps][kHeadsOfTile];
  __shared__ bool is_last;

  QueryFragments<HD> q;
  q.load(static_cast<const __half*>(p.a.heads.q) + seq * p.a.heads.q_stride + head * HD, n_head);
  FlashState<HD> state;
  const int block = p.a.blocks.block, tiles = block / 16;
  const int64_t half_block = static_cast<int64_t>(p.a.heads.n_head_kv) * block * HD;
  const int32_t* table = p.a.blocks.table + static_cast<int64_t>(seq) * p.a.blocks.ld;
  const float scale2 = p.a.heads.scale * kLog2e;
  for (int t = first_tile + begin + warp; t < first_tile + end; t += kWarps) {
    const __half* k = static_cast<const __half*>(p.a.blocks.pool) + table[t / tiles] * 2 * half_block +
                      (static_cast<int64_t>(kv) * block + t % tiles * 16) * HD;
    attend_tile<HD>(state, q, k, k + half_block, first - t * 16, n - t * 16, scale2);
  }
  write_state<HD>(state, rows[warp], n_head);
  __syncthreads();

  // The block's share, or the result.
  auto* states = static_cast<StateRow<HD>*>(p.states) +
                 (static_cast<int64_t>(seq) * p.a.heads.n_head + head) * p.n_split;
  auto* out = static_cast<__half*>(p.a.heads.out) + seq * p.a.heads.out_stride + head * HD;
  for (int i = threadIdx.x; i < n_head * HD; i += 32 * kWarps) {
    const int h = i / HD, d = i % HD;
    float top = -INFINITY;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, rows[w][h].m);
    float l = 0, o = 0;
    for (int w = 0; w < kWarps && top > -INFINITY; ++w) {
      const float weight = power2(rows[w][h].m - top);
      l += weight * rows[w][h].l;
      o += weight * rows[w][h].o[d];
    }
    if (p.n_split == 1) {
      out[h * HD + d] = __float2half_rn(l > 0 ? o / l : 0.0F);
    } else {
      StateRow<HD>& to = states[static_cast<int64_t>(h) * p.n_split + split];
      to.o[d] = o;
      if (d == 0) to.m = top;
      if (d == 0) to.l = l;
    }
  }
  if (p.n_split == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = p.counter + static_cast<int64_t>(seq) * gridDim.y + blockIdx.y;
    is_last = atomicAdd(counter, 1U) == static_cast<uint32_t>(p.n_split) - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < n_head * HD; i += 32 * kWarps) {
    const int h = i / HD, d = i % HD;
    const StateRow<HD>* from = states + static_cast<int64_t>(h) * p.n_split;
    float top = -INFINITY;
    for (int s = 0; s < p.n_split; ++s) top = fmaxf(top, __ldcg(&from[s].m));
    float l = 0, o = 0;
    for (int s = 0; s < p.n_split && top > -INFINITY; ++s) {
      const float weight = power2(__ldcg(&from[s].m) - top);
      l += weight * __ldcg(&from[s].l);
      o += weight * __ldcg(&from[s].o[d]);
    }
    out[h * HD + d] = __float2half_rn(l > 0 ? o / l : 0.0F);
  }
}

}  // namespace

int launch_f16(const narrows_cuda_f16_args& args, const F16Plan& plan, void* workspace, cudaStream_t stream) {
  F16Params p{args,
              static_cast<char*>(workspace) + plan.states,
              static_cast<uint32_t*>(workspace),
              plan.n_split,
              plan.group,
              plan.n_chunk};
  const dim3 grid(static_cast<unsigned>(plan.n_split),
                  static_cast<unsigned>(args.heads.n_head_kv * plan.n_chunk),
                  static_cast<unsigned>(args.heads.n_seq));
  switch (args.heads.head_dim) {
    case 64:
      launch_early(f16_decode<64>, grid, 32 * kWarps, 0, stream, p);
      break;
    case 128:
      launch_early(f16_decode<128>, grid, 32 * kWarps, 0, stream, p);
      break;
    default:
      launch_early(f16_decode<256>, grid, 32 * kWarps, 0, stream, p);
      break;
  }
  return launched();
}

}  // namespace narrows::cuda
