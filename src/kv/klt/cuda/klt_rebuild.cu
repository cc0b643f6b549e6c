// Stage 3 of a klt step on the device: selected keys that are not kept yet, from their bit planes. A block
// has one KV head's inverse transform in shared memory and takes tiles of 64 tokens of a sequence in turn:
// planes to latents (a lane an octet), latents times the transform on tensor cores in bf16, as on the CPU,
// rotation in registers, rows of the kept keys. Bound: 2 n_key head_dim operations a rebuilt token, and some
// 150 to unpack each octet of it.
#include "exec/cuda/launch.h"
#include "kv/klt/cuda/klt_common.cuh"

namespace narrows::cuda {

namespace {

constexpr int kTile = 64;

/// Where a lane finds its octet of the key latents.
struct KeyOctet {
  int at, stride, octet, bits, scale;
  int32_t offset[8];

  __device__ KeyOctet(const narrows_cuda_klt_part& part, int lane) {
    const int n_index = part.n_index / 8;
    const narrows_cuda_planes& planes = lane < n_index ? part.index : part.rest;
    at = planes.at;
    stride = planes.stride;
    octet = lane < n_index ? lane : lane - n_index;
    bits = bits_of(planes, octet);
    scale = part.key_scale_at + lane * 8;
#pragma unroll
    for (int j = 0; j < 8; ++j) offset[j] = planes.offset[j];
  }

  /// Eight latents of a token in bf16, as the CPU's product rounds them; zeros from the coordinates with bits
  /// on.
  __device__ uint4 read(const uint8_t* page, int slot) const {
    const uint2 scales = __ldg(reinterpret_cast<const uint2*>(page + scale));
    uint32_t x, y;
    read_octet<8>(page + at + slot * stride, offset, octet, bits, x, y);
    const float centre = centre_of(bits), unit = bits == 0 ? 0.0F : 1.0F;
    float f[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float code = static_cast<float>((i < 4 ? x : y) >> i % 4 * 8 & 255);
      const auto amplitude = static_cast<uint8_t>((i < 4 ? scales.x : scales.y) >> i % 4 * 8 & 255);
      f[i] = (code - centre) * power2(static_cast<float>(amplitude) * 0.125F - 22.0F) * unit;
    }
    return make_uint4(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]),
                      pack_bf16(f[6], f[7]));
  }
};

/// Twice the warps where blocks are few: each tile is sooner done.
template <int HD, int kWarps>
__global__ __launch_bounds__(32 * kWarps, 16 / kWarps) void klt_rebuild(const __grid_constant__ KltParams p,
                                                                        const int few) {
  constexpr int kThreads = 32 * kWarps;
  extern __shared__ __align__(16) char shared[];
  __shared__ narrows_cuda_klt_part part;
  __shared__ int32_t token_of[kTile];  // of a tile's rows
  __shared__ uint16_t slot_of[kTile];
  const int kv = blockIdx.y, seq = blockIdx.z, hop = p.plan.heads_of_part;
  const int64_t list = static_cast<int64_t>(seq) * p.a.heads.n_head_kv + kv;
  let_next_begin();
  fetch_part(part, p.a.parts[kv / hop]);
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int channel = kv % hop * HD, width = hop * HD, ld = part.n_key + 8;
  constexpr int kLd = HD + 8;  // words of a row of pairs: lanes of one load meet all banks
  auto* decode = reinterpret_cast<uint32_t*>(shared);
  auto* z = reinterpret_cast<__nv_bfloat16*>(decode + part.n_key / 2 * kLd);
  const auto fetch_transform = [&] {
    for (int i = threadIdx.x; i < part.n_key / 2 * (HD / 4); i += kThreads) {
      const int row = i / (HD / 4), chunk = i % (HD / 4);
      copy_async(decode + row * kLd + chunk * 4,
                 part.key_decode + static_cast<int64_t>(row) * width + channel + chunk * 4);
    }
    commit_copies();
  };
  // Few blocks fetch it while they wait; of many, most have nothing to rebuild.
  if (few != 0) fetch_transform();
  after_previous();
  const int n = static_cast<int>(p.at<const uint32_t>(p.plan.at.n_missing)[list]);
  if (static_cast<int>(blockIdx.x) * kTile >= n) return;
  if (few == 0) fetch_transform();
  const int32_t* missing = p.at<const int32_t>(p.plan.at.missing) + list * p.a.pages.max_budget;
  const int32_t* selected = p.at<const int32_t>(p.plan.at.selected) + list * p.a.pages.max_budget;
  const uint16_t* slot = p.at<const uint16_t>(p.plan.at.slot) + list * p.a.pages.max_budget;
  __half* keys = static_cast<__half*>(p.a.kept.keys) + list * p.a.kept.capacity * HD;
  const KeyOctet own(part, lane);
  for (int first = static_cast<int>(blockIdx.x) * kTile; first < n;
       first += static_cast<int>(gridDim.x) * kTile) {
    const int n_row = min(kTile, n - first);
    // This warp's tokens, one after the other: their rows are known at once.
    constexpr int kOwn = kTile / kWarps;
    {
      const int at = missing[min(first + warp * kOwn + lane % kOwn, n - 1)];
      const int token_of_lane = selected[at];
      if (lane < kOwn) {
        token_of[warp * kOwn + lane] = token_of_lane;
        slot_of[warp * kOwn + lane] = slot[at];
      }
#pragma unroll 4
      for (int i = 0; i < kOwn;
           ++i) {  // behind the last: the last again, so that no branch keeps loads apart
        const int token = __shfl_sync(~0U, token_of_lane, i);
        if (lane * 8 < part.n_key)
          *reinterpret_cast<uint4*>(z + (warp * kOwn + i) * ld + lane * 8) =
              own.read(klt_page(p, seq, token / NARROWS_CUDA_PAGE), token % NARROWS_CUDA_PAGE);
      }
    }
    wait_copies<0>();
    __syncthreads();
    // A warp has 8 columns of the head's first half and those that RoPE pairs with them (head_dim 64: half of
    // the rows too).
    constexpr int kAcross = HD / 16, kRows = kTile / 16 * kAcross / kWarps;
    const int pair0 = warp % kAcross * 8, tile0 = warp / kAcross * kRows;
    float d[kRows][2][4] = {};
#pragma unroll 4
    for (int ks = 0; ks < part.n_key / 16; ++ks) {
      uint32_t b[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          b[half][j] = decode[(ks * 8 + j * 4 + c) * kLd + half * (HD / 2) + pair0 + g];
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if ((tile0 + m) * 16 >= n_row) break;
        uint32_t a[4];
        load_matrix4(a, z + ((tile0 + m) * 16 + lane % 16) * ld + ks * 16 + lane / 16 * 8);
#pragma unroll
        for (int t = 0; t < 2; ++t) mma_bf16(d[m][t], a[0], a[1], a[2], a[3], b[t][0], b[t][1]);
      }
    }
    const int pair = pair0 + 2 * c;
    const float2 low = *reinterpret_cast<const float2*>(part.key_mean + channel + pair);
    const float2 high = *reinterpret_cast<const float2*>(part.key_mean + channel + pair + HD / 2);
    // All rotations are asked for before the first is used.
    float4 turn[kRows][2];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        turn[m][r] = __ldg(reinterpret_cast<const float4*>(
            p.a.pages.rope +
            static_cast<int64_t>(p.a.pages.n_sink + token_of[(tile0 + m) * 16 + g + 8 * r]) * HD + 2 * pair));
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = (tile0 + m) * 16 + g + 8 * r;
        if (i >= n_row) continue;
        const float4 by = turn[m][r];
        const float x0 = d[m][0][2 * r] + low.x, x1 = d[m][0][2 * r + 1] + low.y;
        const float y0 = d[m][1][2 * r] + high.x, y1 = d[m][1][2 * r + 1] + high.y;
        __half* row = keys + static_cast<int64_t>(slot_of[i]) * HD + pair;
        *reinterpret_cast<uint32_t*>(row) = pack_half(x0 * by.x - y0 * by.y, x1 * by.z - y1 * by.w);
        *reinterpret_cast<uint32_t*>(row + HD / 2) = pack_half(x0 * by.y + y0 * by.x, x1 * by.w + y1 * by.z);
      }
    }
    __syncthreads();
  }
}

template <int HD>
int launch(const KltParams& p, cudaStream_t stream) {
  int n_key = 0;
  for (int i = 0; i < p.a.n_part; ++i)
    n_key = p.a.host_parts[i].n_key > n_key ? p.a.host_parts[i].n_key : n_key;
  const int bytes = n_key / 2 * (HD + 8) * 4 + kTile * (n_key + 8) * 2;
  // A block a tile, as far as that is few blocks; else about as many as a quarter of the tokens needs, in
  // turn.
  const int n_list = p.a.heads.n_head_kv * p.a.heads.n_seq,
            n_tile = (p.a.pages.max_budget + kTile - 1) / kTile;
  const int across = n_list * n_tile <= 8 * p.plan.n_sm ? n_tile : n_tile < 8 ? 1 : n_tile / 4;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(p.a.heads.n_head_kv),
                  static_cast<unsigned>(p.a.heads.n_seq));
  const bool few = n_list * across <= p.plan.n_sm;
  const auto go = [&](auto kernel, int threads) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
      return launched();
    return launch_early(kernel, grid, threads, bytes, stream, p, few ? 1 : 0);
  };
  return few ? go(klt_rebuild<HD, 16>, 512) : go(klt_rebuild<HD, 8>, 256);
}

}  // namespace

int launch_klt_rebuild(const KltParams& p, cudaStream_t stream) {
  return p.a.heads.head_dim == 64 ? launch<64>(p, stream) : launch<128>(p, stream);
}

}  // namespace narrows::cuda
