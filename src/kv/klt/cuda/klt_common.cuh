// What the kernels of a klt step share: their parameters, and reading bit planes. A byte of a plane is one
// bit of 8 coordinates (an octet). Codes are kept left-aligned: plane j is bit 7 - j, so that a coordinate of
// b bits is (code - (128 - 2^(7 - b))) / 64 * A.
#pragma once

#include "exec/cuda/arguments.h"
#include "exec/cuda/flash_tile.cuh"

namespace narrows::cuda {

/// Of a coordinate's bits, those that scoring looks at, as on the CPU (kernels::kScoreBits).
inline constexpr int kScoreBits = 6;

struct KltParams {
  narrows_cuda_klt_args a;
  KltPlan plan;
  char* work;

  template <class T>
  __device__ T* at(size_t offset) const {
    return reinterpret_cast<T*>(work + offset);
  }
};

__device__ inline const uint8_t* klt_page(const KltParams& p, int seq, int page) {
  return static_cast<const uint8_t*>(p.a.pages.pool) +
         p.a.pages.table[static_cast<int64_t>(seq) * p.a.pages.ld + page] * p.a.pages.page_bytes;
}

__device__ inline float amplitude_of(uint8_t scale) {
  return power2(static_cast<float>(scale) * 0.125F - 16.0F);
}

/// Bits of the coordinates of an octet.
__device__ inline int bits_of(const narrows_cuda_planes& planes, int octet) {
  int bits = 0;
  for (int j = 0; j < planes.n_plane; ++j) bits += planes.octets[j] > octet;
  return bits;
}

/// Left-aligned codes of one token's octet, at most `bits` of kMost: coordinates 0 to 3 in the bytes of x, 4
/// to 7 in y. Without branches, so that all loads are on their way at once.
template <int kMost>
__device__ inline void read_octet(const uint8_t* row, const int32_t (&offset)[8], int octet, int bits,
                                  uint32_t& x, uint32_t& y) {
  uint32_t byte[kMost];
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    byte[j] = 0;
    if (j < bits) byte[j] = row[offset[j] + octet];
  }
  x = y = 0;
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    const uint32_t spread = 0x00204081U << (7 - j), mask = 0x01010101U << (7 - j);
    x |= (byte[j] & 15) * spread & mask;
    y |= (byte[j] >> 4) * spread & mask;
  }
}

/// Puts a part's description into shared memory, where its fields are at hand; a barrier must follow.
__device__ inline void fetch_part(narrows_cuda_klt_part& to, const narrows_cuda_klt_part& from) {
  static_assert(sizeof(narrows_cuda_klt_part) % 4 == 0);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(narrows_cuda_klt_part) / 4); i += blockDim.x)
    reinterpret_cast<uint32_t*>(&to)[i] = reinterpret_cast<const uint32_t*>(&from)[i];
}

/// What to take from a left-aligned code of b bits before it is worth A / 64 a unit.
__device__ inline float centre_of(int bits) { return 128.0F - static_cast<float>(256 >> bits) / 2; }

/// A pair of q turned to its position: q f16 before RoPE.
__device__ inline float2 turned(const __half* q, const float* rope, int pair, int half, float factor) {
  const float2 turn = *reinterpret_cast<const float2*>(rope + 2 * pair);
  const float x = __half2float(q[pair]) * factor, y = __half2float(q[pair + half]) * factor;
  return make_float2(x * turn.x - y * turn.y, x * turn.y + y * turn.x);
}

}  // namespace narrows::cuda
