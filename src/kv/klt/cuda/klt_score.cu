// Stage 1 of a klt step on the device. A block scores 16 pages of a sequence for the query heads of one part:
// the queries at the centres of its pages through the inverse transform (tensor cores, bf16 as on the CPU),
// times the pages' amplitudes, rounded to two signed bytes; then codes, unpacked in registers, times those
// bytes (tensor cores, int8). Other blocks attend to the exact tokens meanwhile, whose sums the selection
// needs. Bound: n_index codes a token and part from memory (24 bytes at 6 bits), 7 operations an octet and
// plane to unpack them.
#include "exec/cuda/launch.h"
#include "kv/klt/cuda/klt_common.cuh"

namespace narrows::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWidestPart = 256;
/// Products of 32 coordinates: n_index is 64 at most.
constexpr int kMostProducts = 2;

/// Shared memory of a block, in bytes from its start.
struct ScoreShared {
  int n_query, padded, columns;  ///< padded: n_index to whole products of 32
  int ld_turn, ld_decode;        ///< words
  int q, u, amplitude, centre, mean, turns, decode, weight, constant, rows, bytes;

  __host__ __device__ ScoreShared(int head_dim, int n_query_in, int width, int n_index, int stride)
      : n_query(n_query_in) {
    ld_turn = head_dim + 8;  // so that lanes of one instruction meet all banks
    ld_decode = width + 8;
    padded = (n_index + 31) / 32 * 32;
    columns = (n_query + 7) / 8 * 8;
    q = 0;
    u = q + n_query * head_dim * 4;
    amplitude = u + kScorePages * n_query * (n_index + 1) * 4;
    centre = amplitude + kScorePages * n_index * 4;
    mean = (centre + n_index / 2 + 15) / 16 * 16;
    turns = mean + width * 4;
    decode = turns + kScorePages * ld_turn * 4;
    weight = decode + n_index / 2 * ld_decode * 4;
    constant = weight + kScorePages * columns * 2 * padded;
    rows = (constant + kScorePages * columns * 12 + 15) / 16 * 16;
    bytes = rows + kScorePages * NARROWS_CUDA_PAGE * stride;
  }
};

/// Attention to the exact tokens of one KV head.
template <int HD>
__device__ void attend_exact(const KltParams& p, int seq, int kv, char* shared) {
  const auto& heads = p.a.heads;
  const auto& exact = p.a.pages.exact;
  const int warp = threadIdx.x / 32, group = p.plan.group;
  // For the histogram of the next stage.
  uint32_t* hist =
      p.at<uint32_t>(p.plan.hist) + (static_cast<int64_t>(seq) * heads.n_head_kv + kv) * kKltHistogram;
  for (int i = threadIdx.x; i < kKltHistogram; i += kThreads) hist[i] = 0;
  auto* q = reinterpret_cast<__half*>(shared);
  auto* rows = reinterpret_cast<StateRow<HD>*>(shared + kTileHeads * HD * 2);  // [kWarps][8]
  const float* rope = p.a.pages.rope + static_cast<int64_t>(p.a.pages.position[seq]) * HD;
  for (int i = threadIdx.x; i < group * HD / 2; i += kThreads) {
    const int h = i / (HD / 2), pair = i % (HD / 2);
    const __half* from = static_cast<const __half*>(heads.q) + seq * heads.q_stride + (kv * group + h) * HD;
    const float2 y = turned(from, rope, pair, HD / 2, 1.0F);
    q[h * HD + pair] = __float2half_rn(y.x);
    q[h * HD + pair + HD / 2] = __float2half_rn(y.y);
  }
  __syncthreads();
  QueryFragments<HD> fragments;
  fragments.load(q, group);
  FlashState<HD> state;
  const int64_t half_block = static_cast<int64_t>(heads.n_head_kv) * NARROWS_CUDA_BLOCK * HD;
  const int n = p.a.pages.n_exact[seq];
  for (int b = warp; b < n; b += kWarps) {
    const int64_t at = static_cast<int64_t>(seq) * exact.ld + b;
    const __half* k = static_cast<const __half*>(exact.pool) + exact.table[at] * 2 * half_block +
                      static_cast<int64_t>(kv) * NARROWS_CUDA_BLOCK * HD;
    attend_tile<HD>(state, fragments, k, k + half_block, 0, p.a.pages.exact_count[at], heads.scale * kLog2e);
  }
  write_state<HD>(state, rows + warp * kTileHeads, group);
  __syncthreads();
  auto* to = p.at<StateRow<HD>>(p.plan.exact) + static_cast<int64_t>(seq) * heads.n_head + kv * group;
  for (int i = threadIdx.x; i < group * HD; i += kThreads) {
    const int h = i / HD, d = i % HD;
    float top = -INFINITY;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, rows[w * kTileHeads + h].m);
    float l = 0, o = 0;
    for (int w = 0; w < kWarps && top > -INFINITY; ++w) {
      const StateRow<HD>& from = rows[w * kTileHeads + h];
      const float weight = power2(from.m - top);
      l += weight * from.l;
      o += weight * from.o[d];
    }
    to[h].o[d] = o;
    if (d == 0) to[h].m = top;
    if (d == 0) to[h].l = l;
  }
}

/// u [16 pages][n_query][n_index + 1] of a block: the queries at the pages' centres, through the transform;
/// the mean key last.
template <int HD>
__device__ void project(const KltParams& p, const narrows_cuda_klt_part& part, const ScoreShared& at,
                        char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int n_tile = (part.n_index + 7) / 8;
  const float* q = reinterpret_cast<const float*>(shared + at.q);
  auto* u = reinterpret_cast<float*>(shared + at.u);
  const auto* turns = reinterpret_cast<const float*>(shared + at.turns);
  const auto* means = reinterpret_cast<const float*>(shared + at.mean);
  const auto* decode = reinterpret_cast<const uint32_t*>(shared + at.decode);
  const int n_item = at.n_query * n_tile;
  uint32_t a[HD / 16][4];
  int held = -1;
  for (int item = n_item * warp / kWarps; item < n_item * (warp + 1) / kWarps; ++item) {
    const int head = item / n_tile, tile = item % n_tile, channel = head / p.plan.group * HD;
    if (head != held) {
      held = head;
      float mean[2] = {0, 0};
#pragma unroll
      for (int ks = 0; ks < HD / 32; ++ks) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // fragment registers: rows g, g + 8, then the upper eight of k
          const int row = g + j % 2 * 8, pair = ks * 16 + 2 * c + j / 2 * 8;
          float x[2], y[2];
          {
            const float4 turn = *reinterpret_cast<const float4*>(turns + row * at.ld_turn + pair * 2);
            const float2 qx = *reinterpret_cast<const float2*>(q + head * HD + pair);
            const float2 qy = *reinterpret_cast<const float2*>(q + head * HD + pair + HD / 2);
            const float2 mx = *reinterpret_cast<const float2*>(means + channel + pair);
            const float2 my = *reinterpret_cast<const float2*>(means + channel + pair + HD / 2);
            x[0] = qx.x * turn.x + qy.x * turn.y;
            y[0] = qy.x * turn.x - qx.x * turn.y;
            x[1] = qx.y * turn.z + qy.y * turn.w;
            y[1] = qy.y * turn.z - qx.y * turn.w;
            mean[j % 2] += x[0] * mx.x + x[1] * mx.y + y[0] * my.x + y[1] * my.y;
          }
          a[ks][j] = pack_bf16(x[0], x[1]);
          a[ks + HD / 32][j] = pack_bf16(y[0], y[1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mean[i] += __shfl_xor_sync(~0U, mean[i], 1);
        mean[i] += __shfl_xor_sync(~0U, mean[i], 2);
        if (c == 0) u[((g + 8 * i) * at.n_query + head) * (part.n_index + 1) + part.n_index] = mean[i];
      }
    }
    float d[4] = {};
    const int coord = tile * 8 + g;
    const uint32_t* words = decode + coord / 2 * at.ld_decode + channel;
    const uint32_t select = coord % 2 == 0 ? 0x5410 : 0x7632;
#pragma unroll
    for (int ks = 0; ks < HD / 16; ++ks) {
      const uint2 low = *reinterpret_cast<const uint2*>(words + ks * 16 + 2 * c);
      const uint2 high = *reinterpret_cast<const uint2*>(words + ks * 16 + 8 + 2 * c);
      mma_bf16(d, a[ks][0], a[ks][1], a[ks][2], a[ks][3], __byte_perm(low.x, low.y, select),
               __byte_perm(high.x, high.y, select));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      u[((g + i / 2 * 8) * at.n_query + head) * (part.n_index + 1) + tile * 8 + 2 * c + i % 2] = d[i];
  }
}

/// The projected queries times amplitudes, as two signed bytes a coordinate: w = unit (high + low / 254).
__device__ void round_weights(const narrows_cuda_klt_part& part, int n_page, const ScoreShared& at,
                              char* shared) {
  const auto* u = reinterpret_cast<const float*>(shared + at.u);
  const auto* amplitude = reinterpret_cast<const float*>(shared + at.amplitude);
  auto* weight = reinterpret_cast<int8_t*>(shared + at.weight);
  auto* constant = reinterpret_cast<float*>(shared + at.constant);
  const auto* centre = reinterpret_cast<const float*>(shared + at.centre);
  const int lane = threadIdx.x % 8, ld = part.n_index + 1;
  // Columns without a head.
  const int n_idle = at.columns - at.n_query;
  for (int i = threadIdx.x; i < n_page * n_idle * (at.padded / 2); i += kThreads) {
    const int item = i / (at.padded / 2), page = item / n_idle, head = at.n_query + item % n_idle;
    reinterpret_cast<uint32_t*>(weight + (page * at.columns + head) * 2 * at.padded)[i % (at.padded / 2)] = 0;
  }
  // Eight lanes a page and head. All of a warp stay in the loop: they shuffle together.
  const int n_item = n_page * at.n_query, n_round = (n_item + kThreads / 8 - 1) / (kThreads / 8);
  for (int round = 0; round < n_round; ++round) {
    const int own_item = round * (kThreads / 8) + static_cast<int>(threadIdx.x) / 8;
    const bool real = own_item < n_item;
    const int page = real ? own_item / at.n_query : 0, head = real ? own_item % at.n_query : 0;
    const int item = page * at.columns + head;
    int8_t* to = weight + item * 2 * at.padded;
    const float* own = u + (page * at.n_query + head) * ld;
    // A lane has four neighbouring coordinates of each product of 32.
    float w[kMostProducts][4], top = 0;
#pragma unroll
    for (int k = 0; k < kMostProducts; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int coord = k * 32 + lane * 4 + i;
        w[k][i] = coord < part.n_index ? own[coord] * amplitude[page * part.n_index + coord] : 0.0F;
        top = fmaxf(top, fabsf(w[k][i]));
      }
    }
    top = fmaxf(top, __shfl_xor_sync(~0U, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0U, top, 2));
    top = fmaxf(top, __shfl_xor_sync(~0U, top, 4));
    const float unit = top * (1.0F / 127), inverse = top > 0 ? __fdividef(127.0F, top) : 0.0F;
    float bias = 0;
#pragma unroll
    for (int k = 0; k < kMostProducts; ++k) {
      if (k * 32 >= at.padded) break;
      uint32_t high4 = 0, low4 = 0;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = w[k][i] * inverse;
        const int high = __float2int_rn(x), low = __float2int_rn((x - static_cast<float>(high)) * 254);
        high4 |= static_cast<uint32_t>(high & 255) << 8 * i;
        low4 |= static_cast<uint32_t>(low & 255) << 8 * i;
        sum += static_cast<float>(high) + static_cast<float>(low) * (1.0F / 254);
      }
      if (k * 32 + lane * 4 < part.n_index) bias -= sum * centre[k * 4 + lane / 2];
      if (real) {
        *reinterpret_cast<uint32_t*>(to + k * 32 + lane * 4) = high4;
        *reinterpret_cast<uint32_t*>(to + at.padded + k * 32 + lane * 4) = low4;
      }
    }
    bias += __shfl_xor_sync(~0U, bias, 1);
    bias += __shfl_xor_sync(~0U, bias, 2);
    bias += __shfl_xor_sync(~0U, bias, 4);
    if (lane == 0 && real) {
      constant[item * 3] = unit;
      constant[item * 3 + 1] = unit * (1.0F / 254);
      constant[item * 3 + 2] = bias * unit + own[part.n_index];
    }
  }
}

/// kBatch: eights of query heads of a part.
template <int HD, int kBatch>
__global__ __launch_bounds__(kThreads,
                             kBatch <= 2 ? 2 : 1) void klt_score(const __grid_constant__ KltParams p) {
  extern __shared__ __align__(16) char shared[];
  const int seq = blockIdx.z, hop = p.plan.heads_of_part;
  // In this order: what is complete before a step's attention is so for the kernels that follow, even before
  // they wait.
  after_previous();
  let_next_begin();
  if (static_cast<int>(blockIdx.x) < hop) {
    attend_exact<HD>(p, seq, static_cast<int>(blockIdx.y) * hop + static_cast<int>(blockIdx.x), shared);
    return;
  }
  const int chunk = static_cast<int>(blockIdx.x) - hop;
  const int n_page =
      min(p.plan.score_pages, p.a.pages.n_tokens[seq] / NARROWS_CUDA_PAGE - chunk * p.plan.score_pages);
  const int first_head = static_cast<int>(blockIdx.y) * hop * p.plan.group;
  const int n_query = hop * p.plan.group;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  auto* totals = p.at<float2>(p.plan.totals);
  if (n_page <= 0) {
    for (int h = threadIdx.x; h < n_query; h += kThreads)
      totals[(static_cast<int64_t>(seq) * p.a.heads.n_head + first_head + h) * p.plan.n_chunk + chunk] =
          make_float2(-INFINITY, 0);
    return;
  }
  __shared__ narrows_cuda_klt_part part;
  fetch_part(part, p.a.parts[blockIdx.y]);
  __syncthreads();
  const int first_page = chunk * p.plan.score_pages, stride = part.index.stride;
  const ScoreShared at(HD, n_query, hop * HD, part.n_index, stride);

  {
    const int width = hop * HD, chunks = width / 4;
    for (int i = threadIdx.x; i < chunks; i += kThreads)
      copy_async(shared + at.mean + i * 16, part.key_mean + i * 4);
    for (int i = threadIdx.x; i < kScorePages * (HD / 4); i += kThreads) {
      const int row = i / (HD / 4), chunk = i % (HD / 4);
      copy_async(shared + at.turns + (row * at.ld_turn + chunk * 4) * 4,
                 p.a.turns + static_cast<int64_t>(first_page + min(row, n_page - 1)) * HD + chunk * 4);
    }
    for (int i = threadIdx.x; i < part.n_index / 2 * (kWidestPart / 4); i += kThreads) {
      const int row = i / (kWidestPart / 4), chunk = i % (kWidestPart / 4);
      if (chunk >= chunks) continue;
      copy_async(shared + at.decode + (row * at.ld_decode + chunk * 4) * 4,
                 part.key_decode + row * width + chunk * 4);
    }
    commit_copies();
  }
  // The pages' rows follow, while queries are projected.
  const int copies = NARROWS_CUDA_PAGE * stride / 16;
  for (int page = warp; page < n_page; page += kWarps) {
    const uint8_t* from = klt_page(p, seq, first_page + page) + part.index.at;
    for (int i = lane; i < copies; i += 32)
      copy_async(shared + at.rows + page * NARROWS_CUDA_PAGE * stride + i * 16, from + i * 16);
  }
  commit_copies();

  const float* rope = p.a.pages.rope + static_cast<int64_t>(p.a.pages.position[seq]) * HD;
  auto* q = reinterpret_cast<float*>(shared + at.q);
  for (int i = threadIdx.x; i < n_query * HD / 2; i += kThreads) {
    const int h = i / (HD / 2), pair = i % (HD / 2);
    const __half* from =
        static_cast<const __half*>(p.a.heads.q) + seq * p.a.heads.q_stride + (first_head + h) * HD;
    const float2 y = turned(from, rope, pair, HD / 2, p.a.heads.scale * kLog2e);
    q[h * HD + pair] = y.x;
    q[h * HD + pair + HD / 2] = y.y;
  }
  auto* amplitude = reinterpret_cast<float*>(shared + at.amplitude);
  for (int i = threadIdx.x; i < n_page * part.n_index; i += kThreads) {
    const uint8_t* page = klt_page(p, seq, first_page + i / part.n_index);
    amplitude[i] = amplitude_of(page[part.key_scale_at + i % part.n_index]) / 64;
  }
  if (static_cast<int>(threadIdx.x) < part.n_index / 8)
    reinterpret_cast<float*>(shared + at.centre)[threadIdx.x] =
        centre_of(min(kScoreBits, bits_of(part.index, static_cast<int>(threadIdx.x))));
  wait_copies<1>();  // of all but the rows
  __syncthreads();
  project<HD>(p, part, at, shared);
  __syncthreads();
  round_weights(part, n_page, at, shared);
  __syncthreads();

  int32_t offset[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) offset[j] = part.index.offset[j];
  const int bits_low = min(kScoreBits, bits_of(part.index, c)),
            bits_high = min(kScoreBits, bits_of(part.index, c + 4));
  const int n_product = at.padded / 32;
  float m[kBatch][2], l[kBatch][2];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) m[b][0] = m[b][1] = -INFINITY, l[b][0] = l[b][1] = 0;
  const int64_t ld =
      static_cast<int64_t>(p.a.pages.n_max + NARROWS_CUDA_PAGE - 1) / NARROWS_CUDA_PAGE * NARROWS_CUDA_PAGE;
  float* scores =
      p.at<float>(p.plan.scores) + (static_cast<int64_t>(seq) * p.a.heads.n_head + first_head) * ld;
  wait_copies<0>();
  __syncthreads();
  // A warp has a page, or some tiles of one where there are fewer pages than warps.
  const int tiles = p.plan.score_pages >= kWarps ? 4 : p.plan.score_pages * 4 / kWarps;
  for (int item = warp; item * tiles < n_page * 4; item += kWarps) {
    const int page = item * tiles / 4, first_tile = item * tiles % 4;
    const uint64_t anchors = *reinterpret_cast<const uint64_t*>(klt_page(p, seq, first_page + page));
    const auto* rows = reinterpret_cast<const uint8_t*>(shared + at.rows) + page * NARROWS_CUDA_PAGE * stride;
    const auto* weight =
        reinterpret_cast<const char*>(shared + at.weight) + page * at.columns * 2 * at.padded;
    const auto* constant = reinterpret_cast<const float*>(shared + at.constant) + page * at.columns * 3;
#pragma unroll 1
    for (int tile = first_tile; tile < first_tile + tiles; ++tile) {
      int32_t high[kBatch][4] = {}, low[kBatch][4] = {};
      for (int k = 0; k < n_product; ++k) {
        const int octet = k * 4 + c;
        const int bits = k == 0 ? bits_low : bits_high;
        uint32_t a0, a1, a2, a3;
        read_octet<kScoreBits>(rows + (tile * 16 + g) * stride, offset, octet, bits, a0, a2);
        read_octet<kScoreBits>(rows + (tile * 16 + g + 8) * stride, offset, octet, bits, a1, a3);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const char* w = weight + (b * 8 + g) * 2 * at.padded + octet * 8;
          const uint2 first = *reinterpret_cast<const uint2*>(w);
          const uint2 second = *reinterpret_cast<const uint2*>(w + at.padded);
          mma_u8s8(high[b], a0, a1, a2, a3, first.x, first.y);
          mma_u8s8(low[b], a0, a1, a2, a3, second.x, second.y);
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int head = b * 8 + 2 * c + j;
          if (head >= n_query) continue;
          const float* k = constant + head * 3;
          float s[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int t = tile * 16 + g + 8 * r;
            s[r] = static_cast<float>(high[b][2 * r + j]) * k[0] +
                   static_cast<float>(low[b][2 * r + j]) * k[1] + k[2];
            if ((anchors >> t & 1) != 0) s[r] = -INFINITY;
            scores[head * ld + (first_page + page) * NARROWS_CUDA_PAGE + t] = s[r];
          }
          const float top = fmaxf(m[b][j], fmaxf(s[0], s[1]));
          const float base = top == -INFINITY ? 0.0F : top;
          l[b][j] = l[b][j] * power2(m[b][j] - base) + power2(s[0] - base) + power2(s[1] - base);
          m[b][j] = top;
        }
      }
    }
  }
  __syncthreads();

  // Largest and sum of each head over the block's tokens.
  auto* shares = reinterpret_cast<float2*>(shared + at.u);  // [kWarps][columns]
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float top = max_rows(m[b][j]);
      const float base = top == -INFINITY ? 0.0F : top;
      const float sum = sum_rows(l[b][j] * power2(m[b][j] - base));
      if (g == 0) shares[warp * kBatch * 8 + b * 8 + 2 * c + j] = make_float2(top, sum);
    }
  }
  __syncthreads();
  for (int h = threadIdx.x; h < n_query; h += kThreads) {
    float2 all = make_float2(-INFINITY, 0);
    for (int w = 0; w < kWarps; ++w) all.x = fmaxf(all.x, shares[w * kBatch * 8 + h].x);
    const float base = all.x == -INFINITY ? 0.0F : all.x;
    for (int w = 0; w < kWarps; ++w)
      all.y += shares[w * kBatch * 8 + h].y * power2(shares[w * kBatch * 8 + h].x - base);
    totals[(static_cast<int64_t>(seq) * p.a.heads.n_head + first_head + h) * p.plan.n_chunk + chunk] = all;
  }
}

template <int HD>
int launch(const KltParams& p, int batch, int bytes, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.heads_of_part + p.plan.n_chunk),
                  static_cast<unsigned>(p.a.n_part), static_cast<unsigned>(p.a.heads.n_seq));
  const auto go = [&](auto kernel) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
      return launched();
    return launch_early(kernel, grid, kThreads, bytes, stream, p);
  };
  if (batch == 1) return go(klt_score<HD, 1>);
  if (batch == 2) return go(klt_score<HD, 2>);
  return go(klt_score<HD, 4>);
}

}  // namespace

int launch_klt_score(const KltParams& p, cudaStream_t stream) {
  const int hd = p.a.heads.head_dim, n_query = p.plan.heads_of_part * p.plan.group;
  int bytes = kTileHeads * hd * 2 + kWarps * kTileHeads * (hd + 4) * 4;  // of attend_exact()
  for (int i = 0; i < p.a.n_part; ++i) {
    const auto& part = p.a.host_parts[i];
    const int own =
        ScoreShared(hd, n_query, p.plan.heads_of_part * hd, part.n_index, part.index.stride).bytes;
    if (own > bytes) bytes = own;
  }
  const int batch = (n_query + 7) / 8;
  return hd == 64 ? launch<64>(p, batch, bytes, stream) : launch<128>(p, batch, bytes, stream);
}

}  // namespace narrows::cuda
