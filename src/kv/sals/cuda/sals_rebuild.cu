// Stage 3 of a SALS step on the device: latents of tokens times the basis, [tokens, rank] x [rank, D], tensor
// cores. A block keeps the latents of its tokens in shared memory and walks over heads, whose rows of the
// basis stream through a ring of stages: the latents are gathered once, and what is read again and again is
// the basis, from L2. Keys are rotated in registers; with kept keys they are written to their rows, else only
// their products with the query leave the block. Bound: 2 tokens rank D operations.
#include "exec/cuda/launch.h"
#include "kv/sals/cuda/sals_common.cuh"

namespace narrows::cuda {

/// By wgmma, on a device of compute capability 9.0; fits: whether its shared memory is enough (else nothing
/// was launched).
int launch_sals_rebuild_sm90(const SalsParams& p, int n_sm, int most, cudaStream_t stream, bool& fits);

namespace {

constexpr int kStageDepth = 64;  ///< of rank in a stage
constexpr int kColumns = 128;    ///< channels of a tile: one head of 128 or two of 64

/// Where 16-byte chunk `chunk` of row `row` lies: rows of whole 128 bytes, chunks turned so that 8 rows meet
/// 32 banks.
__device__ inline int swizzled(int row, int chunk, int row_bytes) {
  return row * row_bytes + ((chunk & ~7) | ((chunk ^ row) & 7)) * 16;
}

template <int HD, int M, int kStages, bool kKeep>
__global__ __launch_bounds__(2 * M, 1) void sals_rebuild(const __grid_constant__ SalsParams p,
                                                         const int n_across) {
  extern __shared__ __align__(128) char shared[];
  constexpr int kThreads = 2 * M;
  constexpr int kHeads = kColumns / HD;
  constexpr int kMostGroup = 8;
  const int seq = blockIdx.z, tile = blockIdx.x;
  const uint32_t n = p.at<const uint32_t>(p.plan.at.n_missing)[seq];
  if (static_cast<uint32_t>(tile * M) >= n) return;
  const int n_row = min(M, static_cast<int>(n) - tile * M);
  const auto& heads = p.a.heads;
  const int rank = p.a.rank, row_bytes = rank * 2, width = heads.n_head_kv * HD;
  const int n_tile = (heads.n_head_kv + kHeads - 1) / kHeads;
  const int first_tile = n_tile * static_cast<int>(blockIdx.y) / n_across;
  const int end_tile = n_tile * (static_cast<int>(blockIdx.y) + 1) / n_across;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  char* latents = shared;
  char* stages = shared + M * row_bytes;
  // The queries of this block's heads, which the products are multiplied by.
  float* query = reinterpret_cast<float*>(stages + kStages * kColumns * kStageDepth * 2);
  const int first_head = first_tile * kHeads * p.plan.group;

  const int32_t* selected =
      p.at<const int32_t>(p.plan.at.selected) + static_cast<int64_t>(seq) * p.a.pages.max_budget;
  const int32_t* missing =
      p.at<const int32_t>(p.plan.at.missing) + static_cast<int64_t>(seq) * p.a.pages.max_budget;
  const auto index_of = [&](int row) { return kKeep ? missing[tile * M + row] : tile * M + row; };
  for (int row = warp; row < M; row += kThreads / 32) {
    if (row >=
        n_row) {  // zeros: a row that nobody reads must not be a NaN's neighbour in a matrix unit's eyes
      for (int i = lane; i < rank / 8; i += 32)
        *reinterpret_cast<uint4*>(latents + swizzled(row, i, row_bytes)) = make_uint4(0, 0, 0, 0);
      continue;
    }
    const int token = selected[index_of(row)];
    const uint8_t* from = sals_page(p, seq, token / NARROWS_CUDA_PAGE) +
                          static_cast<int64_t>(token % NARROWS_CUDA_PAGE) * row_bytes;
    for (int i = lane; i < rank / 8; i += 32)
      copy_async(latents + swizzled(row, i, row_bytes), from + i * 16);
  }

  const int depths = rank / kStageDepth, n_step = (end_tile - first_tile) * depths;
  constexpr int kStageBytes = kColumns * kStageDepth * 2;
  const auto fetch = [&](int step) {
    if (step < n_step) {
      const int column = (first_tile + step / depths) * kColumns;
      const char* from = static_cast<const char*>(p.a.basis) + static_cast<int64_t>(column) * row_bytes +
                         step % depths * kStageDepth * 2;
      char* to = stages + step % kStages * kStageBytes;
#pragma unroll
      for (int i = threadIdx.x; i < kStageBytes / 16; i += kThreads) {
        const int row = min(i / 8, width - 1 - column);  // of a last head alone in its tile: any rows
        copy_async(to + swizzled(i / 8, i % 8, kStageDepth * 2),
                   from + static_cast<int64_t>(row) * row_bytes + i % 8 * 16);
      }
    }
    commit_copies();
  };
  if constexpr (!kKeep) {
    const int n_query = min(end_tile * kHeads * p.plan.group, heads.n_head) - first_head;
    const float* from =
        p.at<const float>(p.plan.query) + (static_cast<int64_t>(seq) * heads.n_head + first_head) * HD;
    for (int i = threadIdx.x; i < n_query * HD / 4; i += kThreads) copy_async(query + i * 4, from + i * 4);
  }
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  // A warp has 32 rows and 64 columns: 32 of a head's first half and those that RoPE pairs with them.
  const int row0 = warp / 2 * 32, part = warp % 2;
  const int column0 = HD == 128 ? part * 32 : part * 64, pair0 = HD == 128 ? part * 32 : 0;
  float2 turn[2][2][4][2];  // of this lane's rows and pairs
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = min(row0 + m * 16 + r * 8 + g, n_row - 1);
      const float* rope =
          p.a.pages.rope + static_cast<int64_t>(p.a.pages.n_sink + selected[index_of(row)]) * HD;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const float4 two = *reinterpret_cast<const float4*>(rope + 2 * (pair0 + t * 8 + 2 * c));
        turn[m][r][t][0] = make_float2(two.x, two.y);
        turn[m][r][t][1] = make_float2(two.z, two.w);
      }
    }
  }

  float d[2][8][4];
  for (int step = 0; step < n_step; ++step) {
    if (step % depths == 0) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) d[m][t][i] = 0;
    }
    wait_copies<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    const char* stage = stages + step % kStages * kStageBytes;
    const int chunk0 = step % depths * (kStageDepth / 8);
#pragma unroll
    for (int k = 0; k < kStageDepth / 16; ++k) {
      uint32_t a[2][4], b[4][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrix4(a[m],
                     latents + swizzled(row0 + m * 16 + lane % 16, chunk0 + 2 * k + lane / 16, row_bytes));
#pragma unroll
      for (int t = 0; t < 4; ++t) {  // 16 columns: two tiles, both halves of k
        const int column = column0 + (t / 2) * (HD / 2) + t % 2 * 16 + lane / 16 * 8 + lane % 8;
        load_matrix4(b[t], stage + swizzled(column, 2 * k + lane / 8 % 2, kStageDepth * 2));
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int t = 0; t < 8; ++t)
          mma_f16(d[m][t], a[m][0], a[m][1], a[m][2], a[m][3], b[t / 2][t % 2 * 2], b[t / 2][t % 2 * 2 + 1]);
    }
    if (step % depths != depths - 1) continue;

    const int head_tile = first_tile + step / depths;
    const int kv = head_tile * kHeads + (HD == 128 ? 0 : part);
    const bool real = kv < heads.n_head_kv;
    if constexpr (kKeep) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = row0 + m * 16 + r * 8 + g;
          if (row >= n_row || !real) continue;
          const int slot = p.at<const uint16_t>(
              p.plan.at.slot)[static_cast<int64_t>(seq) * p.a.pages.max_budget + index_of(row)];
          __half* to = static_cast<__half*>(p.a.kept.keys) +
                       (static_cast<int64_t>(seq) * p.a.kept.capacity + slot) * width + kv * HD + pair0;
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            const float2 u = turn[m][r][t][0], v = turn[m][r][t][1];
            const float x0 = d[m][t][2 * r], x1 = d[m][t][2 * r + 1];
            const float y0 = d[m][t + 4][2 * r], y1 = d[m][t + 4][2 * r + 1];
            *reinterpret_cast<uint32_t*>(to + t * 8 + 2 * c) =
                pack_half(x0 * u.x - y0 * u.y, x1 * v.x - y1 * v.y);
            *reinterpret_cast<uint32_t*>(to + HD / 2 + t * 8 + 2 * c) =
                pack_half(x0 * u.y + y0 * u.x, x1 * v.y + y1 * v.x);
          }
        }
      }
    } else {
      for (int h = 0; h < p.plan.group && h < kMostGroup; ++h) {
        const int head = kv * p.plan.group + h;
        const float* q = query + (real ? head - first_head : 0) * HD + pair0;
        float sum[2][2] = {};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const float2 q1 = *reinterpret_cast<const float2*>(q + t * 8 + 2 * c);
          const float2 q2 = *reinterpret_cast<const float2*>(q + HD / 2 + t * 8 + 2 * c);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const float2 u = turn[m][r][t][0], v = turn[m][r][t][1];
              sum[m][r] += d[m][t][2 * r] * (u.x * q1.x + u.y * q2.x) +
                           d[m][t + 4][2 * r] * (u.x * q2.x - u.y * q1.x) +
                           d[m][t][2 * r + 1] * (v.x * q1.y + v.y * q2.y) +
                           d[m][t + 4][2 * r + 1] * (v.x * q2.y - v.y * q1.y);
            }
          }
        }
        // Heads of 128 are shared by two warps, whose sums are added where they are read.
        constexpr int kShares = HD / 64;
        float* to = p.at<float>(p.plan.logits) +
                    ((static_cast<int64_t>(seq) * heads.n_head + head) * kShares + part % kShares) *
                        p.a.pages.max_budget +
                    tile * M;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float x = sum[m][r];
            x += __shfl_xor_sync(~0U, x, 1);
            x += __shfl_xor_sync(~0U, x, 2);
            const int row = row0 + m * 16 + r * 8 + g;
            if (c == 0 && row < n_row && real) to[row] = x;
          }
        }
      }
    }
  }
  wait_copies<0>();
}

/// Queries at their positions, f32.
__global__ void sals_query(const __grid_constant__ SalsParams p) {
  const auto& heads = p.a.heads;
  const int seq = blockIdx.y, hd = heads.head_dim, half = hd / 2;
  const float* rope = p.a.pages.rope + static_cast<int64_t>(p.a.pages.position[seq]) * hd;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < heads.n_head * half; i += gridDim.x * blockDim.x) {
    const int head = i / half, pair = i % half;
    const __half* q = static_cast<const __half*>(heads.q) + seq * heads.q_stride + head * hd;
    const float2 turn = *reinterpret_cast<const float2*>(rope + 2 * pair);
    const float x = __half2float(q[pair]), y = __half2float(q[pair + half]);
    float* to = p.at<float>(p.plan.query) + (static_cast<int64_t>(seq) * heads.n_head + head) * hd;
    to[pair] = x * turn.x - y * turn.y;
    to[pair + half] = x * turn.y + y * turn.x;
  }
}

template <int HD, int M, int kStages, bool kKeep>
int launch(const SalsParams& p, int n_sm, int bytes, cudaStream_t stream) {
  const auto& heads = p.a.heads;
  const int n_tile = (heads.n_head_kv * HD + kColumns - 1) / kColumns;
  const int across = (p.a.pages.max_budget + M - 1) / M;
  // With kept keys about a quarter of the tokens are rebuilt.
  const int expected = heads.n_seq * (kKeep ? (across + 3) / 4 : across);
  int n_across = n_sm / expected;
  if (n_across < 1) n_across = 1;
  if (n_across > n_tile) n_across = n_tile;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(n_across),
                  static_cast<unsigned>(heads.n_seq));
  const auto kernel = sals_rebuild<HD, M, kStages, kKeep>;
  if (!kKeep) {  // queries of the most tiles that a block takes
    bytes += (n_tile + n_across - 1) / n_across * (kColumns / HD) * p.plan.group * HD * 4;
  }
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched();
  kernel<<<grid, 2 * M, static_cast<size_t>(bytes), stream>>>(p, n_across);
  return launched();
}

template <int HD, bool kKeep>
int choose(const SalsParams& p, cudaStream_t stream) {
  int device = 0, n_sm = 0, most = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return launched();
  if (major == 9) {
    bool fits = false;
    const int status = launch_sals_rebuild_sm90(p, n_sm, most, stream, fits);
    if (status != NARROWS_CUDA_OK || fits) return status;
  }
  constexpr int kStageBytes = kColumns * kStageDepth * 2;
  // Beside what a kernel has anyway, the queries of all heads at worst.
  const int row = p.a.rank * 2, fixed = 1024 + (kKeep ? 0 : (p.a.heads.n_head + p.plan.group) * HD * 4);
  const auto need = [&](int rows, int stages) { return rows * row + stages * kStageBytes; };
  if (need(128, 4) + fixed <= most) return launch<HD, 128, 4, kKeep>(p, n_sm, need(128, 4), stream);
  if (need(128, 2) + fixed <= most) return launch<HD, 128, 2, kKeep>(p, n_sm, need(128, 2), stream);
  if (need(64, 2) + fixed <= most) return launch<HD, 64, 2, kKeep>(p, n_sm, need(64, 2), stream);
  return NARROWS_CUDA_UNSUPPORTED;
}

}  // namespace

int launch_sals_rebuild(const SalsParams& p, cudaStream_t stream) {
  const bool keep = p.a.kept.keys != nullptr;
  if (!keep) {
    const dim3 grid(static_cast<unsigned>((p.a.heads.n_head * p.a.heads.head_dim / 2 + 255) / 256),
                    static_cast<unsigned>(p.a.heads.n_seq));
    sals_query<<<grid, 256, 0, stream>>>(p);
  }
  if (p.a.heads.head_dim == 64) return keep ? choose<64, true>(p, stream) : choose<64, false>(p, stream);
  return keep ? choose<128, true>(p, stream) : choose<128, false>(p, stream);
}

}  // namespace narrows::cuda
