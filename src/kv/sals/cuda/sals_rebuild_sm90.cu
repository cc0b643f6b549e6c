// Stage 3 of a SALS step on Hopper: as sals_rebuild.cu, by wgmma. Both factors are read by the tensor cores
// from shared memory, in rows of 128 bytes whose 16-byte chunks are turned (the hardware's 128-byte swizzle):
// latents in blocks of 64 of rank, all of them for the block's 128 tokens; the basis in a ring of four
// stages. Two warpgroups have 64 tokens and a tile of 128 channels each, so that a token's whole head is in
// the registers of four lanes.
#include "exec/cuda/launch.h"
#include "kv/sals/cuda/sals_common.cuh"

namespace narrows::cuda {

namespace {

constexpr int kRows = 128, kColumns = 128, kThreads = 256, kStages = 4;
constexpr int kDepth = 64;  ///< of rank in a stage: 128 bytes
constexpr int kTileBytes = kRows * kDepth * 2;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline int turned_chunk(int row, int chunk) { return row * 128 + ((chunk ^ row) & 7) * 16; }

/// Rows of 128 bytes, groups of 8 rows 1,024 apart, 128-byte swizzle.
__device__ inline uint64_t descriptor(const void* shared) {
  const auto at = static_cast<uint64_t>(__cvta_generic_to_shared(shared));
  return (at & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

/// d [64, 128] = (add ? d : 0) + a [64, 16] b [128, 16]^T
__device__ inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%"
      "27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%"
      "57,%58,%59,%60,"
      "%61,%62,%63}, %64, %65, p, 1, 1, 0, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),
        "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
        "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),
        "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
        "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]),
        "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]),
        "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(a), "l"(b), "r"(add));
}

template <int kLeft>
__device__ inline void wait_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

#endif

template <int HD, bool kKeep>
__global__ __launch_bounds__(kThreads, 1) void sals_rebuild_sm90(const __grid_constant__ SalsParams p,
                                                                 const int n_across) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  constexpr int kHeads = kColumns / HD;
  constexpr int kHalf = HD / 16;  // tiles of 8 channels in half a head
  const int seq = blockIdx.z, tile = blockIdx.x;
  const int n = static_cast<int>(p.at<const uint32_t>(p.plan.at.n_missing)[seq]);
  if (tile * kRows >= n) return;
  const int n_row = min(kRows, n - tile * kRows);
  const auto& heads = p.a.heads;
  const int rank = p.a.rank, width = heads.n_head_kv * HD, depths = rank / kDepth, group = p.plan.group;
  const int n_tile = (heads.n_head_kv + kHeads - 1) / kHeads;
  const int first_tile = n_tile * static_cast<int>(blockIdx.y) / n_across;
  const int end_tile = n_tile * (static_cast<int>(blockIdx.y) + 1) / n_across;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  char* latents = shared;  // [depths][128 rows][128 bytes]
  char* stages = shared + depths * kTileBytes;
  float* query = reinterpret_cast<float*>(stages + kStages * kTileBytes);
  const int first_head = first_tile * kHeads * group;

  const int32_t* selected =
      p.at<const int32_t>(p.plan.at.selected) + static_cast<int64_t>(seq) * p.a.pages.max_budget;
  const int32_t* missing =
      p.at<const int32_t>(p.plan.at.missing) + static_cast<int64_t>(seq) * p.a.pages.max_budget;
  const auto index_of = [&](int row) { return kKeep ? missing[tile * kRows + row] : tile * kRows + row; };
  for (int row = warp; row < kRows; row += kThreads / 32) {
    const int token = selected[index_of(min(row, n_row - 1))];  // behind the last: the last again
    const uint8_t* from = sals_page(p, seq, token / NARROWS_CUDA_PAGE) +
                          static_cast<int64_t>(token % NARROWS_CUDA_PAGE) * rank * 2;
    for (int i = lane; i < rank / 8; i += 32)
      copy_async(latents + i / 8 * kTileBytes + turned_chunk(row, i % 8), from + i * 16);
  }
  if constexpr (!kKeep) {
    const int n_query = min(end_tile * kHeads * group, heads.n_head) - first_head;
    const float* from =
        p.at<const float>(p.plan.query) + (static_cast<int64_t>(seq) * heads.n_head + first_head) * HD;
    for (int i = threadIdx.x; i < n_query * HD / 4; i += kThreads) copy_async(query + i * 4, from + i * 4);
  }
  const int n_step = (end_tile - first_tile) * depths;
  int fetched_tile = first_tile, fetched_depth = 0;
  const auto fetch = [&](int step) {
    if (step < n_step) {
      const int column = fetched_tile * kColumns;
      const char* from = static_cast<const char*>(p.a.basis) +
                         (static_cast<int64_t>(column) * rank + fetched_depth * kDepth) * 2;
      char* to = stages + step % kStages * kTileBytes;
#pragma unroll
      for (int k = 0; k < kTileBytes / 16 / kThreads; ++k) {
        const int i = threadIdx.x + k * kThreads;
        const int row = min(i / 8, width - 1 - column);
        copy_async(to + turned_chunk(i / 8, i % 8), from + static_cast<int64_t>(row) * rank * 2 + i % 8 * 16);
      }
      if (++fetched_depth == depths) fetched_depth = 0, ++fetched_tile;
    }
    commit_copies();
  };
  fetch(0);
  fetch(1);

  const int row0 = warp * 16 + g;  // warps 0 to 3 are the first warpgroup
  float2 turn[2][kHalf][2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = min(row0 + 8 * r, n_row - 1);
    const float* rope =
        p.a.pages.rope + static_cast<int64_t>(p.a.pages.n_sink + selected[index_of(row)]) * HD;
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      const float4 two = *reinterpret_cast<const float4*>(rope + 2 * (j * 8 + 2 * c));
      turn[r][j][0] = make_float2(two.x, two.y);
      turn[r][j][1] = make_float2(two.z, two.w);
    }
  }

  float d[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) d[i] = 0;
  const char* own = latents + warp / 4 * 64 * 128;
  int head_tile = first_tile, depth = 0;
  for (int step = 0; step < n_step; ++step) {
    wait_copies<1>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    wait_wgmma<1>();  // the products before the last ones: their stage is free
    __syncthreads();
    fetch(step + 2);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const uint64_t a = descriptor(own + depth * kTileBytes),
                   b = descriptor(stages + step % kStages * kTileBytes);
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) wgmma(d, a + 2 * k, b + 2 * k, depth == 0 && k == 0 ? 0 : 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (++depth < depths) continue;
    depth = 0;
    wait_wgmma<0>();
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");

#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const int kv = head_tile * kHeads + k;
      if (kv >= heads.n_head_kv) break;
      if constexpr (kKeep) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = row0 + 8 * r;
          if (row >= n_row) continue;
          const int slot = p.at<const uint16_t>(
              p.plan.at.slot)[static_cast<int64_t>(seq) * p.a.pages.max_budget + index_of(row)];
          __half* to = static_cast<__half*>(p.a.kept.keys) +
                       (static_cast<int64_t>(seq) * p.a.kept.capacity + slot) * width + kv * HD + 2 * c;
#pragma unroll
          for (int j = 0; j < kHalf; ++j) {
            const float2 u = turn[r][j][0], v = turn[r][j][1];
            const float x0 = d[(k * 2 * kHalf + j) * 4 + 2 * r], x1 = d[(k * 2 * kHalf + j) * 4 + 2 * r + 1];
            const float y0 = d[(k * 2 * kHalf + kHalf + j) * 4 + 2 * r],
                        y1 = d[(k * 2 * kHalf + kHalf + j) * 4 + 2 * r + 1];
            *reinterpret_cast<uint32_t*>(to + j * 8) = pack_half(x0 * u.x - y0 * u.y, x1 * v.x - y1 * v.y);
            *reinterpret_cast<uint32_t*>(to + HD / 2 + j * 8) =
                pack_half(x0 * u.y + y0 * u.x, x1 * v.y + y1 * v.x);
          }
        }
      } else {
        for (int h = 0; h < group; ++h) {
          const int head = kv * group + h;
          const float* q = query + (head - first_head) * HD + 2 * c;
          float sum[2] = {};
#pragma unroll
          for (int j = 0; j < kHalf; ++j) {
            const float2 q1 = *reinterpret_cast<const float2*>(q + j * 8);
            const float2 q2 = *reinterpret_cast<const float2*>(q + HD / 2 + j * 8);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const float2 u = turn[r][j][0], v = turn[r][j][1];
              const float* x = d + (k * 2 * kHalf + j) * 4 + 2 * r;
              const float* y = d + (k * 2 * kHalf + kHalf + j) * 4 + 2 * r;
              sum[r] += x[0] * (u.x * q1.x + u.y * q2.x) + y[0] * (u.x * q2.x - u.y * q1.x) +
                        x[1] * (v.x * q1.y + v.y * q2.y) + y[1] * (v.x * q2.y - v.y * q1.y);
            }
          }
          constexpr int kShares = HD / 64;  // as sals_rebuild.cu writes them
          float* to = p.at<float>(p.plan.logits) +
                      (static_cast<int64_t>(seq) * heads.n_head + head) * kShares * p.a.pages.max_budget +
                      tile * kRows;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(~0U, sum[r], 1);
            sum[r] += __shfl_xor_sync(~0U, sum[r], 2);
            const int row = row0 + 8 * r;
            if (c == 0 && row < n_row) to[row] = sum[r];
            if (kShares == 2 && c == 1 && row < n_row) to[p.a.pages.max_budget + row] = 0;
          }
        }
      }
    }
    ++head_tile;
  }
  wait_copies<0>();
#endif
}

template <int HD, bool kKeep>
int launch(const SalsParams& p, int n_sm, int most, cudaStream_t stream, bool& fits) {
  const auto& heads = p.a.heads;
  const int n_tile = (heads.n_head_kv * HD + kColumns - 1) / kColumns;
  const int across = (p.a.pages.max_budget + kRows - 1) / kRows;
  const int expected = heads.n_seq * (kKeep ? (across + 3) / 4 : across);  // about a quarter is rebuilt
  int n_across = n_sm / expected;
  if (n_across < 1) n_across = 1;
  if (n_across > n_tile) n_across = n_tile;
  int bytes = (p.a.rank / kDepth + kStages) * kTileBytes;
  if (!kKeep) bytes += (n_tile + n_across - 1) / n_across * (kColumns / HD) * p.plan.group * HD * 4;
  fits = bytes <= most;
  if (!fits) return NARROWS_CUDA_OK;
  const auto kernel = sals_rebuild_sm90<HD, kKeep>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched();
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(n_across),
                  static_cast<unsigned>(heads.n_seq));
  kernel<<<grid, kThreads, static_cast<size_t>(bytes), stream>>>(p, n_across);
  return launched();
}

}  // namespace

int launch_sals_rebuild_sm90(const SalsParams& p, int n_sm, int most, cudaStream_t stream, bool& fits) {
  const bool keep = p.a.kept.keys != nullptr;
  if (p.a.heads.head_dim == 64)
    return keep ? launch<64, true>(p, n_sm, most, stream, fits)
                : launch<64, false>(p, n_sm, most, stream, fits);
  return keep ? launch<128, true>(p, n_sm, most, stream, fits)
              : launch<128, false>(p, n_sm, most, stream, fits);
}

}  // namespace narrows::cuda
