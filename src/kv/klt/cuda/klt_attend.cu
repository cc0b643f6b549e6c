// Stages 3 and 4 of a klt step on the device: keys that are not kept yet are rebuilt, all selected ones scored, and weighted sums of
// VALUE LATENTS added up from their bit planes; the last block of a KV head merges all shares with the exact tokens' and
// applies the inverse transform of the values once.
//
// The sums of planes are products of signs with weights: a bit becomes the half +1 or -1 by two instructions, rows are bits of plane
// bytes, k are 16 tokens, and columns are (page, query head) pairs, since amplitudes are those of a page: a page's sums are
// multiplied by its amplitudes afterwards. So a block takes tokens by groups of as many pages as the 8 columns hold.
// Bound: 2 head_dim + row bytes a selected token and KV head from memory; 2.5 operations a byte, bit row and pair of tokens.
#include "exec/cuda/launch.h"
#include "kv/klt/cuda/klt_common.cuh"

namespace narrows::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
/// Tokens that are rebuilt together.
constexpr int kRebuild = 64;
/// Coordinates of a part at most.
constexpr int kWidest = 256;

/// Shared memory of a block: its tokens, then what rebuilding and summing need in turn.
struct AttendShared {
  int room;  ///< tokens of a share, rounded up for whole tiles
  int selected, slot, score, weight, common;
  int planes;    ///< [most_planes] octet of a byte, then its plane
  int partial;   ///< f32 [most_planes][8][columns], behind the amplitudes
  int bytes;

  __host__ __device__ AttendShared(int max_budget, int n_split, int group, int columns, int head_dim, int n_key,
                                   int most_planes) {
    room = ((max_budget + n_split - 1) / n_split + 15) / 16 * 16 + 16;
    selected = 0;
    slot = selected + room * 4;
    weight = slot + room * 2;
    score = weight + group * room * 2;
    planes = (score + group * room * 4 + 15) / 16 * 16;
    common = (planes + 2 * most_planes + 15) / 16 * 16;
    const int tile = kRebuild * (n_key + 8) * 2, amplitudes = 2 * kWidest * (8 / columns) * 4;
    partial = common + amplitudes;
    const int sums = amplitudes + most_planes * 8 * columns * 4;
    int most = tile;
    if (sums > most) most = sums;
    const int merge = group * kWidest * 4 + kThreads * 8 * 4 + group * head_dim * 4;
    if (merge > most) most = merge;
    bytes = common + most;
  }
};

/// First of n ascending numbers that is at least x.
__device__ inline int lower_bound(const int32_t* a, int n, int x) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (a[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/// Key latents of one token in bf16, a lane an octet: z [n_key], zeros from the coordinates with bits on.
__device__ inline void unpack_key(const narrows_cuda_klt_part& part, const uint8_t* page, int slot, int octet,
                                  int bits, __nv_bfloat16* z) {
  const int n_index = part.n_index / 8;
  uint32_t x, y;
  if (octet < n_index) {
    read_octet(page + part.index.at + slot * part.index.stride, part.index.offset, octet, bits, x, y);
  } else {
    read_octet(page + part.rest.at + slot * part.rest.stride, part.rest.offset, octet - n_index, bits, x, y);
  }
  const float centre = centre_of(bits);
  float f[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float code = static_cast<float>((i < 4 ? x : y) >> i % 4 * 8 & 255);
    f[i] = bits == 0 ? 0.0F : (code - centre) * (amplitude_of(page[part.key_scale_at + octet * 8 + i]) / 64);
  }
  *reinterpret_cast<uint4*>(z) =
      make_uint4(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]), pack_bf16(f[6], f[7]));
}

/// Rebuilds tokens [n] (selected[which[i]]) and writes them, rotated, to their rows.
template <int HD>
__device__ void rebuild(const KltParams& p, const narrows_cuda_klt_part& part, int seq, int channel, __half* keys,
                        const int32_t* selected, const uint16_t* slot, const int32_t* which, int n, int base,
                        __nv_bfloat16* z) {
  constexpr int kTiles = HD / 64;  // of 8 columns, in each half of a warp's share of the head
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int ld = part.n_key + 8, width = p.plan.heads_of_part * HD;
  {
    const int n_index = part.n_index / 8;
    const int bits = lane < n_index ? bits_of(part.index, lane) : bits_of(part.rest, lane - n_index);
    for (int i = warp; i < n; i += kWarps) {
      const int token = selected[which[i] - base];
      const uint8_t* page = klt_page(p, seq, token / NARROWS_CUDA_PAGE);
      if (lane * 8 < part.n_key) unpack_key(part, page, token % NARROWS_CUDA_PAGE, lane, bits, z + i * ld + lane * 8);
    }
  }
  __syncthreads();
  const int tiles = (n + 15) / 16;
  float d[kRebuild / 16][2 * kTiles][4] = {};
  const int first = warp * (HD / 8);  // column of the half head
  for (int ks = 0; ks < part.n_key / 16; ++ks) {
    uint32_t b[2 * kTiles][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t* words = part.key_decode + static_cast<int64_t>(ks * 8 + j * 4 + c) * width + channel +
                                half * (HD / 2) + first + g * kTiles;
        if constexpr (kTiles == 2) {
          const uint2 two = __ldg(reinterpret_cast<const uint2*>(words));
          b[half * 2][j] = two.x;
          b[half * 2 + 1][j] = two.y;
        } else {
          b[half][j] = __ldg(words);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRebuild / 16; ++m) {
      if (m >= tiles) break;
      uint32_t a[4];
      load_matrix4(a, z + (m * 16 + lane % 16) * ld + ks * 16 + lane / 16 * 8);
#pragma unroll
      for (int t = 0; t < 2 * kTiles; ++t) mma_bf16(d[m][t], a[0], a[1], a[2], a[3], b[t][0], b[t][1]);
    }
  }
#pragma unroll
  for (int m = 0; m < kRebuild / 16; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = m * 16 + g + 8 * r;
      if (i >= n) continue;
      const int at = which[i] - base;
      const float* rope = p.a.pages.rope + static_cast<int64_t>(p.a.pages.n_sink + selected[at]) * HD;
      __half* row = keys + static_cast<int64_t>(slot[at]) * HD;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int pair = first + (2 * c + j) * kTiles + t;
          const float2 turn = *reinterpret_cast<const float2*>(rope + 2 * pair);
          const float x = d[m][t][2 * r + j] + part.key_mean[channel + pair];
          const float y = d[m][kTiles + t][2 * r + j] + part.key_mean[channel + pair + HD / 2];
          row[pair] = __float2half_rn(x * turn.x - y * turn.y);
          row[pair + HD / 2] = __float2half_rn(x * turn.y + y * turn.x);
        }
      }
    }
  }
  __syncthreads();
}

/// Bytes [first, first + 2 T) of value rows: sums over the block's tokens, to `partial` [byte][8 bits][columns].
template <int T, int kColumns>
__device__ void sum_planes(const KltParams& p, const narrows_cuda_klt_part& part, int seq, const AttendShared& at,
                           char* shared, int n, int first) {
  constexpr int kPages = 8 / kColumns;
  constexpr int kSums = kColumns == 1 ? 2 : 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const auto* selected = reinterpret_cast<const int32_t*>(shared + at.selected);
  const auto* weight = reinterpret_cast<const __half*>(shared + at.weight);
  const auto* octet_of = reinterpret_cast<const uint8_t*>(shared + at.planes);
  auto* amplitude = reinterpret_cast<float*>(shared + at.common);  // [2][coordinate][page]
  const int own = first + warp * 2 * T, row_bytes = part.value.stride;
  float sums[T][kSums] = {};
  int turn = 0;
  const int head = g % kColumns, sub = g / kColumns;
  for (int i = 0; i < n; turn ^= 1) {
    const int span = selected[i] / NARROWS_CUDA_PAGE / kPages;
    const int end = i + lower_bound(selected + i, n - i, (span + 1) * kPages * NARROWS_CUDA_PAGE);
    float* now = amplitude + turn * kWidest * kPages;
    for (int j = threadIdx.x; j < kPages * part.n_value / 4; j += kThreads) {
      const int page = span * kPages + j / (part.n_value / 4), coord = j % (part.n_value / 4) * 4;
      float x[4] = {0, 0, 0, 0};
      if (page * NARROWS_CUDA_PAGE < p.a.pages.n_tokens[seq]) {
        const uchar4 scale =
            *reinterpret_cast<const uchar4*>(klt_page(p, seq, page) + part.value_scale_at + coord);
        x[0] = amplitude_of(scale.x), x[1] = amplitude_of(scale.y);
        x[2] = amplitude_of(scale.z), x[3] = amplitude_of(scale.w);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) now[(coord + k) * kPages + page % kPages] = x[k];
    }
    float d[T][4] = {};
    for (; i < end; i += 16) {
      // The four tokens of this lane's fragments; those behind the end have weight 0 and any row.
      const uint8_t* row[4];
      uint32_t b[2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = i + 2 * c + j % 2 + j / 2 * 8;
        const int token = selected[min(k, end - 1)], page = token / NARROWS_CUDA_PAGE;
        row[j] = klt_page(p, seq, page) + part.value.at + token % NARROWS_CUDA_PAGE * row_bytes + own;
        const bool mine = k < end && (kPages == 1 || page % kPages == sub);
        const uint32_t w = mine ? __half_as_ushort(weight[head * at.room + k]) : 0U;
        b[j / 2] = j % 2 == 0 ? w : b[j / 2] | w << 16;
      }
#pragma unroll
      for (int part8 = 0; part8 < T / 4; ++part8) {  // 8 bytes of each row
        uint2 x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[j] = make_uint2(0, 0);
          if (own + part8 * 8 < row_bytes) x[j] = __ldg(reinterpret_cast<const uint2*>(row[j] + part8 * 8));
          x[j].x <<= 7 - g;  // bit g of a byte becomes its highest
          x[j].y <<= 7 - g;
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          uint32_t a[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // byte 2 t + j % 2 of tokens of half j / 2
            const int byte = t % 2 * 2 + j % 2;
            const uint32_t low = t < 2 ? x[j / 2 * 2].x : x[j / 2 * 2].y;
            const uint32_t high = t < 2 ? x[j / 2 * 2 + 1].x : x[j / 2 * 2 + 1].y;
            const uint32_t signs = __byte_perm(low, high, static_cast<uint32_t>(byte << 4 | (byte + 4) << 12));
            a[j] = (signs & 0x80008000U) ^ 0xBC00BC00U;
          }
          mma_f16(d[part8 * 4 + t], a[0], a[1], a[2], a[3], b[0], b[1]);
        }
      }
    }
    i = end;
    __syncthreads();  // the amplitudes are there; the others of the two are free
#pragma unroll
    for (int t = 0; t < T; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* x = now + (octet_of[min(own + 2 * t + r, p.plan.most_planes - 1)] * 8 + g) * kPages;
        if constexpr (kColumns == 1) {
          const float2 y = *reinterpret_cast<const float2*>(x + 2 * c);
          sums[t][r] += d[t][2 * r] * y.x + d[t][2 * r + 1] * y.y;
        } else {
          const float y = x[2 * c / kColumns];
          sums[t][2 * r] += d[t][2 * r] * y;
          sums[t][2 * r + 1] += d[t][2 * r + 1] * y;
        }
      }
    }
  }
  __syncthreads();
  // Lanes whose columns are the same head's in several pages.
  auto* partial = reinterpret_cast<float*>(shared + at.partial);
#pragma unroll
  for (int t = 0; t < T; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int byte = own + 2 * t + r;
#pragma unroll
      for (int j = 0; j < kSums / 2; ++j) {
        float x = sums[t][r * (kSums / 2) + j];
        if constexpr (kColumns <= 2) x += __shfl_xor_sync(~0U, x, 1);
        if constexpr (kColumns <= 4) x += __shfl_xor_sync(~0U, x, 2);
        const int column = kColumns == 1 ? 0 : (2 * c + j) % kColumns;
        if (byte < p.plan.most_planes && 2 * c < max(kColumns, 2)) partial[(byte * 8 + g) * kColumns + column] = x;
      }
    }
  }
  __syncthreads();
}

template <int HD, int kColumns>
__global__ __launch_bounds__(kThreads, 3) void klt_attend(const __grid_constant__ KltParams p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ float top_of[kWarps][kTileHeads];
  __shared__ float sum_of[kWarps][kTileHeads];
  __shared__ bool is_last;
  constexpr int kTiles = kColumns == 1 ? 12 : 8;  // of two bytes, a warp and pass
  const int split = blockIdx.x, kv = blockIdx.y, seq = blockIdx.z, group = p.plan.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int64_t list = static_cast<int64_t>(seq) * p.a.heads.n_head_kv + kv;
  const int first_head = kv * group, hop = p.plan.heads_of_part;
  const narrows_cuda_klt_part& part = p.a.parts[kv / hop];
  const int channel = kv % hop * HD;
  const AttendShared at(p.a.pages.max_budget, p.plan.n_split, group, kColumns, HD, kWidest, p.plan.most_planes);
  auto* selected = reinterpret_cast<int32_t*>(shared + at.selected);
  auto* slot = reinterpret_cast<uint16_t*>(shared + at.slot);
  auto* weight = reinterpret_cast<__half*>(shared + at.weight);
  auto* score = reinterpret_cast<float*>(shared + at.score);

  const int64_t n_all = p.at<const uint32_t>(p.plan.at.n_selected)[list];
  const int begin = static_cast<int>(n_all * split / p.plan.n_split);
  const int n = static_cast<int>(n_all * (split + 1) / p.plan.n_split) - begin;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    selected[i] = p.at<const int32_t>(p.plan.at.selected)[list * p.a.pages.max_budget + begin + i];
    slot[i] = p.at<const uint16_t>(p.plan.at.slot)[list * p.a.pages.max_budget + begin + i];
  }
  {  // where the bytes of a value row belong
    auto* octet_of = reinterpret_cast<uint8_t*>(shared + at.planes);
    for (int i = threadIdx.x; i < p.plan.most_planes; i += kThreads) {
      octet_of[i] = 0;
      octet_of[p.plan.most_planes + i] = 255;
      for (int j = 0; j < part.value.n_plane; ++j) {
        const int o = i - part.value.offset[j];
        if (o < 0 || o >= part.value.octets[j]) continue;
        octet_of[i] = static_cast<uint8_t>(o);
        octet_of[p.plan.most_planes + i] = static_cast<uint8_t>(j);
      }
    }
  }
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

  // Keys that are missing.
  __half* keys = static_cast<__half*>(p.a.kept.keys) + list * p.a.kept.capacity * HD;
  {
    const int32_t* missing = p.at<const int32_t>(p.plan.at.missing) + list * p.a.pages.max_budget;
    const int n_missing = static_cast<int>(p.at<const uint32_t>(p.plan.at.n_missing)[list]);
    const int from = lower_bound(missing, n_missing, begin), to = lower_bound(missing, n_missing, begin + n);
    for (int i = from; i < to; i += kRebuild) {
      rebuild<HD>(p, part, seq, channel, keys, selected, slot, missing + i, min(kRebuild, to - i), begin,
                  reinterpret_cast<__nv_bfloat16*>(shared + at.common));
    }
  }

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
      const float x = exp2f(score[h * at.room + i] - top);
      weight[h * at.room + i] = __float2half_rn(x);
      sum += x;
    }
#pragma unroll
    for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(~0U, sum, i);
    if (lane == 0) sum_of[warp][h] = sum;
  }
  __syncthreads();

  // Weighted sums of planes, then of coordinates.
  const int row_bytes = p.plan.most_planes;
  for (int first = 0; first < row_bytes; first += kWarps * 2 * kTiles)
    sum_planes<kTiles, kColumns>(p, part, seq, at, shared, n, first);
  const auto* partial = reinterpret_cast<const float*>(shared + at.partial);
  float* latents = p.at<float>(p.plan.latents) +
                   ((static_cast<int64_t>(seq) * p.a.heads.n_head + first_head) * p.plan.n_split + split) *
                       p.plan.ld_latent;
  auto* states = p.at<float2>(p.plan.states) + (static_cast<int64_t>(seq) * p.a.heads.n_head + first_head) * p.plan.n_split;
  const int64_t ld_head = static_cast<int64_t>(p.plan.n_split) * p.plan.ld_latent;
  for (int i = threadIdx.x; i < group * part.n_value; i += kThreads) {
    const int h = i / part.n_value, coord = i % part.n_value;
    float sum = 0, unit = 1;
    for (int j = 0; j < part.value.n_plane; ++j, unit /= 2) {
      if (coord / 8 >= part.value.octets[j]) break;
      sum += unit * partial[((part.value.offset[j] + coord / 8) * 8 + coord % 8) * kColumns + h];
    }
    __stcg(&latents[h * ld_head + coord], n > 0 ? sum : 0.0F);
  }
  if (threadIdx.x < group) {
    float top = -INFINITY, sum = 0;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, top_of[w][threadIdx.x]);
    for (int w = 0; w < kWarps; ++w) sum += sum_of[w][threadIdx.x];
    __stcg(&states[threadIdx.x * p.plan.n_split + split], n > 0 ? make_float2(top, sum) : make_float2(-INFINITY, 0));
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = p.at<uint32_t>(p.plan.counter) + list;
    is_last = atomicAdd(counter, 1U) == static_cast<uint32_t>(p.plan.n_split) - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  // The shares of this KV head, merged with the exact tokens.
  auto* latent = reinterpret_cast<float*>(shared + at.common);  // [group][kWidest]
  auto* shares = latent + group * kWidest;                      // [kThreads][8]
  auto* result = shares + kThreads * 8;                         // [group][HD]
  const auto* exact = p.at<const StateRow<HD>>(p.plan.exact) + static_cast<int64_t>(seq) * p.a.heads.n_head + first_head;
  latents = p.at<float>(p.plan.latents) +
            (static_cast<int64_t>(seq) * p.a.heads.n_head + first_head) * ld_head;
  for (int h = 0; h < group; ++h) {
    float top = exact[h].m;
    for (int s = 0; s < p.plan.n_split; ++s) top = fmaxf(top, __ldcg(&states[h * p.plan.n_split + s]).x);
    for (int i = threadIdx.x; i < part.n_value; i += kThreads) {
      float sum = 0;
      for (int s = 0; s < p.plan.n_split && top > -INFINITY; ++s)
        sum += exp2f(__ldcg(&states[h * p.plan.n_split + s]).x - top) * __ldcg(&latents[h * ld_head + s * p.plan.ld_latent + i]);
      latent[h * kWidest + i] = sum;
    }
  }
  __syncthreads();
  constexpr int kAcross = HD / 8;                 // threads of a row of the transform
  constexpr int kRows = kThreads / kAcross;       // rows at a time
  const int width = hop * HD, across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const __half* decode = static_cast<const __half*>(part.value_decode) + channel + across * 8;
  for (int h = 0; h < group; ++h) {
    float acc[8] = {};
#pragma unroll 8
    for (int i = down; i < part.n_value; i += kRows) {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(decode + static_cast<int64_t>(i) * width));
      const float w = latent[h * kWidest + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t word = word_of(x, j);
        const float2 y = __half22float2(*reinterpret_cast<const __half2*>(&word));
        acc[2 * j] += w * y.x;
        acc[2 * j + 1] += w * y.y;
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; ++j) shares[(down * kAcross + across) * 8 + j] = acc[j];
    __syncthreads();
    float top = exact[h].m;
    for (int s = 0; s < p.plan.n_split; ++s) top = fmaxf(top, __ldcg(&states[h * p.plan.n_split + s]).x);
    float in_pages = 0;
    for (int s = 0; s < p.plan.n_split && top > -INFINITY; ++s) {
      const float2 x = __ldcg(&states[h * p.plan.n_split + s]);
      in_pages += exp2f(x.x - top) * x.y;
    }
    const float keep = top > -INFINITY ? exp2f(exact[h].m - top) : 0.0F;
    const float total = in_pages + keep * exact[h].l;
    for (int d = threadIdx.x; d < HD; d += kThreads) {
      float y = keep * exact[h].o[d] + in_pages * part.value_mean[channel + d];
      for (int r = 0; r < kRows; ++r) y += shares[r * HD + d];
      result[h * HD + d] = total > 0 ? y / total : 0.0F;
    }
  }
  __syncthreads();
  auto* out = static_cast<__half*>(p.a.heads.out) + seq * p.a.heads.out_stride + first_head * HD;
  for (int i = threadIdx.x; i < group * HD; i += kThreads) out[i] = __float2half_rn(result[i]);
}

template <int HD>
int launch(const KltParams& p, cudaStream_t stream) {
  const AttendShared at(p.a.pages.max_budget, p.plan.n_split, p.plan.group, p.plan.columns, HD, kWidest,
                        p.plan.most_planes);
  const dim3 grid(static_cast<unsigned>(p.plan.n_split), static_cast<unsigned>(p.a.heads.n_head_kv),
                  static_cast<unsigned>(p.a.heads.n_seq));
  const auto go = [&](auto kernel) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes) != cudaSuccess)
      return launched();
    kernel<<<grid, kThreads, static_cast<size_t>(at.bytes), stream>>>(p);
    return launched();
  };
  switch (p.plan.columns) {
    case 1: return go(klt_attend<HD, 1>);
    case 2: return go(klt_attend<HD, 2>);
    case 4: return go(klt_attend<HD, 4>);
    default: return go(klt_attend<HD, 8>);
  }
}

}  // namespace

int launch_klt_score(const KltParams& p, cudaStream_t stream);
int launch_klt_select(const KltParams& p, cudaStream_t stream);

int launch_klt(const narrows_cuda_klt_args& args, const KltPlan& plan, void* workspace, cudaStream_t stream) {
  const KltParams p{args, plan, static_cast<char*>(workspace)};
  if (const int status = launch_klt_score(p, stream); status != NARROWS_CUDA_OK) return status;
  if (const int status = launch_klt_select(p, stream); status != NARROWS_CUDA_OK) return status;
  return args.heads.head_dim == 64 ? launch<64>(p, stream) : launch<128>(p, stream);
}

}  // namespace narrows::cuda
