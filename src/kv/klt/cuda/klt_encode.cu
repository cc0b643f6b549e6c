// Pages of a klt cache made on the device: a block takes 64 tokens of one part's keys or values through the
// transform, a thread a coordinate, whose 64 numbers stay in registers while scales are tried and codes made;
// bits of neighbouring coordinates meet by votes of a warp. The arithmetic is that of quant_latents()
// (kernels/latent.cpp); docs/cache_layout.md draws the page.
#include "exec/cuda/layer_ops.h"

namespace narrows::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTokens = NARROWS_CUDA_PAGE;
/// Channels of the tokens that are in shared memory at a time, and floats between them: rows of four tokens
/// are aligned, and writing them transposed meets few conflicts.
constexpr int kDepth = 32, kStride = kTokens + 4;
constexpr float kLargest = 3.402823466e38F;

/// Mantissas of 2^(i / 8), as kernels::kAmplitude has them.
__constant__ float eighths[8] = {1.0F,
                                 1.0905077326652577F,
                                 1.189207115002721F,
                                 1.2968395546510096F,
                                 1.4142135623730951F,
                                 1.5422108254079407F,
                                 1.681792830507429F,
                                 1.8340080864093424F};
/// As kernels::kScaleSteps.
__constant__ int scale_steps[5] = {1, -2, -5, -8, -11};

__device__ float power(int exponent) { return __int_as_float((exponent + 127) << 23); }
__device__ float amplitude(int scale) { return eighths[scale & 7] * power((scale >> 3) - 16); }

/// Largest scale with amplitude <= x, as if the table had no ends; x is normal.
__device__ int floor_scale(float x) {
  const int bits = __float_as_int(x);
  const float mantissa = __int_as_float((bits & 0x007FFFFF) | 0x3F800000);
  int eighth = 0;
#pragma unroll
  for (int i = 1; i < 8; ++i) eighth += mantissa >= eighths[i] ? 1 : 0;
  return ((bits >> 23) - 127) * 8 + eighth + 128;
}

__device__ float code_of(float z, float step, float half, float top) {
  return fminf(fmaxf(floorf(__fdiv_rn(z, step)) + half, 0.0F), top);
}

/// All bytes of the pages: anchors, then zeros.
__global__ void clear_pages(const __grid_constant__ device::KltEncodeArgs a) {
  auto* page = reinterpret_cast<uint4*>(static_cast<char*>(a.pool) + a.table[blockIdx.x] * a.page_bytes);
  const uint64_t anchors = a.anchors[blockIdx.x];
  for (int64_t i = threadIdx.x; i < a.page_bytes / 16; i += kThreads) {
    const bool head = i == 0;
    page[i] = make_uint4(head ? static_cast<uint32_t>(anchors) : 0U,
                         head ? static_cast<uint32_t>(anchors >> 32) : 0U, 0U, 0U);
  }
}

/// z of this thread's coordinate: sums over the channels, in order, for all tokens.
__device__ void transform(const device::KltEncodeArgs& a, const float* x, const float* mean,
                          const float* project, uint64_t anchors, bool mine, float* shared,
                          float (&z)[kTokens]) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) z[t] = 0;
  for (int first = 0; first < a.width; first += kDepth) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTokens * kDepth; i += kThreads) {
      const int t = i / kDepth, c = i % kDepth;
      const bool held = first + c < a.width && (anchors >> t & 1) == 0;
      shared[c * kStride + t] = held ? x[t * a.ld + first + c] - mean[first + c] : 0.0F;
    }
    __syncthreads();
    const int depth = min(kDepth, a.width - first);
    for (int c = 0; mine && c < depth; ++c) {
      const float w = project[static_cast<int64_t>(first + c) * a.width];
      const float4* row = reinterpret_cast<const float4*>(shared + c * kStride);
#pragma unroll
      for (int t = 0; t < kTokens / 4; ++t) {
        const float4 four = row[t];
        z[4 * t] = fmaf(four.x, w, z[4 * t]);
        z[4 * t + 1] = fmaf(four.y, w, z[4 * t + 1]);
        z[4 * t + 2] = fmaf(four.z, w, z[4 * t + 2]);
        z[4 * t + 3] = fmaf(four.w, w, z[4 * t + 3]);
      }
    }
  }
}

/// The scale of the least squared error; -1: a number cannot be stored.
__device__ int best_scale(const float (&z)[kTokens], int bits) {
  float largest = 0;
  bool finite = true;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    finite = finite && fabsf(z[t]) <= kLargest;
    largest = fmaxf(largest, fabsf(z[t]));
  }
  if (!finite) return -1;
  const int first = largest < amplitude(0) ? 0 : floor_scale(largest) - 8;
  if (first + scale_steps[0] > 255) return -1;
  const float half = 0.5F * power(bits), top = 2 * half - 1;
  float least = __int_as_float(0x7F800000);
  int best = 0;
  for (int k = 0; k < 5; ++k) {
    const int scale = max(0, first + scale_steps[k]);
    const float step = amplitude(scale) * power(2 - bits);
    float error = 0;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float off = z[t] - (code_of(z[t], step, half, top) - half + 0.5F) * step;
      error = fmaf(off, off, error);
    }
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

/// Plane by plane: lane t of a warp gets what its 32 coordinates have of token t, and writes the bytes.
__device__ void write_planes(const float (&z)[kTokens], int bits, float step, uint8_t* page,
                             const narrows_cuda_klt_part& part, bool is_key, const uint8_t* octet_bits) {
  const int lane = threadIdx.x % 32, octet = threadIdx.x / 32 * 4;
  const float half = 0.5F * power(bits), top = 2 * half - 1;
  const int n_index = is_key ? part.n_index / 8 : 0;
#pragma unroll
  for (int first = 0; first < kTokens; first += 32) {
    uint32_t word[8] = {};
#pragma unroll
    for (int t = 0; t < 32; ++t) {
      const int code = bits > 0 ? static_cast<int>(code_of(z[first + t], step, half, top)) : 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t vote = __ballot_sync(~0U, j < bits && (code >> (bits - 1 - j) & 1) != 0);
        word[j] = lane == t ? vote : word[j];
      }
    }
    const int64_t token = first + lane;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 4; ++k) {
        const int o = octet + k;
        if (o >= 32 || j >= octet_bits[o]) continue;
        const bool in_index = o < n_index;
        const narrows_cuda_planes& planes = !is_key ? part.value : in_index ? part.index : part.rest;
        page[planes.at + token * planes.stride + planes.offset[j] + (in_index || !is_key ? o : o - n_index)] =
            static_cast<uint8_t>(word[j] >> 8 * k);
      }
    }
  }
}

/// Blocks x are pages, y a part's keys, then its values.
__global__ __launch_bounds__(kThreads, 2) void encode_pages(const __grid_constant__ device::KltEncodeArgs a) {
  __shared__ __align__(16) float shared[kDepth * kStride];
  __shared__ narrows_cuda_klt_part part;
  const int p = blockIdx.y / 2, c = threadIdx.x;
  const bool is_key = blockIdx.y % 2 == 0;
  const auto* from = reinterpret_cast<const uint32_t*>(a.parts + p);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(part) / 4); i += kThreads)
    reinterpret_cast<uint32_t*>(&part)[i] = from[i];
  __syncthreads();
  const uint8_t* octet_bits = a.bits + blockIdx.y * 32;
  const int bits = octet_bits[c / 8];
  const bool mine = bits > 0 && c < a.width;
  float z[kTokens];
  const float* x = (is_key ? a.k : a.v) + static_cast<int64_t>(blockIdx.x) * kTokens * a.ld + p * a.width;
  transform(a, x, is_key ? part.key_mean : part.value_mean,
            a.project + static_cast<int64_t>(blockIdx.y) * a.width * a.width + c, a.anchors[blockIdx.x], mine,
            shared, z);
  auto* page = static_cast<uint8_t*>(a.pool) + a.table[blockIdx.x] * a.page_bytes;
  const int scale = mine ? best_scale(z, bits) : 0;
  if (scale < 0) a.bad[blockIdx.x] = 1;
  if (mine)
    page[(is_key ? part.key_scale_at : part.value_scale_at) + c] = static_cast<uint8_t>(max(scale, 0));
  write_planes(z, mine ? bits : 0, amplitude(max(scale, 0)) * power(2 - bits), page, part, is_key,
               octet_bits);
}

}  // namespace

bool launch_klt_encode(const device::KltEncodeArgs& a, cudaStream_t stream) {
  if (a.width < 8 || a.width > kThreads || a.width % 8 != 0) return false;
  clear_pages<<<a.n_page, kThreads, 0, stream>>>(a);
  encode_pages<<<dim3(a.n_page, 2 * a.n_part), kThreads, 0, stream>>>(a);
  return true;
}

}  // namespace narrows::cuda
