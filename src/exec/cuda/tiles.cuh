// The tiles of kernels/packed_weights.h as a warp reads them. Of a group of 32 inputs lane (i, p) = (lane /
// 8, lane % 8) has rows 2 p and 2 p + 1, and of these the codes of inputs 4 i .. 4 i + 3 and 16 + 4 i .. in a
// word each: 8 neighbouring bytes a lane.
#pragma once

#include <cuda_fp16.h>

#include "kernels/packed_weights.h"

namespace narrows::cuda {

using kernels::Packing;

/// Codes of a row, four a word: of inputs 4 i .., and of 16 + 4 i ..; q8_0's are signed, others from 0.
struct CodeWords {
  uint32_t low[2], high[2];
};

template <Packing p>
__device__ inline CodeWords load_codes(const uint8_t* group, int i, int pair) {
  constexpr int kBits = kernels::code_bits(p);
  const uint2 a = __ldcs(reinterpret_cast<const uint2*>(group + 64 * i + 8 * pair));
  if constexpr (kBits == 8) {
    const uint2 b = __ldcs(reinterpret_cast<const uint2*>(group + 64 * (4 + i) + 8 * pair));
    return {{a.x ^ 0x80808080U, a.y ^ 0x80808080U}, {b.x ^ 0x80808080U, b.y ^ 0x80808080U}};
  }
  CodeWords w = {{a.x & 0x0F0F0F0FU, a.y & 0x0F0F0F0FU}, {a.x >> 4 & 0x0F0F0F0FU, a.y >> 4 & 0x0F0F0F0FU}};
  if constexpr (kBits == 5) {
    const uint2 h = *reinterpret_cast<const uint2*>(group + 256 + 8 * pair);
    w.low[0] |= (h.x >> i & 0x01010101U) << 4;
    w.low[1] |= (h.y >> i & 0x01010101U) << 4;
    w.high[0] |= (h.x >> (4 + i) & 0x01010101U) << 4;
    w.high[1] |= (h.y >> (4 + i) & 0x01010101U) << 4;
  }
  if constexpr (kBits == 6) {
    const uint2 h = *reinterpret_cast<const uint2*>(group + 256 + 8 * pair);
    const uint2 k = *reinterpret_cast<const uint2*>(group + 320 + 8 * pair);
    w.low[0] |= (h.x >> 2 * i & 0x03030303U) << 4;
    w.low[1] |= (h.y >> 2 * i & 0x03030303U) << 4;
    w.high[0] |= (k.x >> 2 * i & 0x03030303U) << 4;
    w.high[1] |= (k.y >> 2 * i & 0x03030303U) << 4;
  }
  return w;
}

/// weight = d code + m, for the first and second 16 inputs of a group (which differ in q6_k alone).
struct RowScale {
  float d[2], m[2];
};

__device__ inline uint32_t six_bits(const uint8_t* packed, int v, int r) {
  if (v < 12) return packed[16 * v + r] & 63U;
  const int i = v - 12;
  return packed[16 * i + r] >> 6U | (packed[16 * (4 + i) + r] >> 6U) << 2U |
         (packed[16 * (8 + i) + r] >> 6U) << 4U;
}

/// Of row r and group g of a record.
template <Packing p>
__device__ inline RowScale load_scale(const uint8_t* record, int g, int r) {
  constexpr int kHalves = 2 * static_cast<int>(kernels::kPackRows);
  const float d = __half2float(*reinterpret_cast<const __half*>(record + 2 * r));
  if constexpr (p == Packing::q6_k) {
    const auto* s = reinterpret_cast<const int8_t*>(record + kHalves + 32 * g + r);
    const float d0 = d * s[0], d1 = d * s[16];
    return {{d0, d1}, {-32 * d0, -32 * d1}};
  } else if constexpr (kernels::is_super(p)) {
    const float m = __half2float(*reinterpret_cast<const __half*>(record + kHalves + 2 * r));
    const uint8_t* six = record + 2 * kHalves;
    const float scale = d * six_bits(six, 2 * g, r), minimum = -m * six_bits(six, 2 * g + 1, r);
    return {{scale, scale}, {minimum, minimum}};
  } else if constexpr (kernels::has_minimum(p)) {
    const float m = __half2float(*reinterpret_cast<const __half*>(record + kHalves + 2 * r));
    return {{d, d}, {m, m}};
  } else {
    // q8_0's codes have had their zero taken away.
    constexpr int kZero = p == Packing::q8_0 ? 0 : 1 << kernels::zero_shift(p);
    return {{d, d}, {-kZero * d, -kZero * d}};
  }
}

/// Scales of rows 2 p and 2 p + 1 of a group: weight = d code + m; of q6_k weight = d (code - 32) for the
/// first 16 inputs and m (code - 32) for the others.
struct PairScale {
  float d[2], m[2];
};

__device__ inline float2 load_halves(const uint8_t* at) {
  return __half22float2(*reinterpret_cast<const __half2*>(at));
}
/// Two neighbouring bytes.
__device__ inline uint32_t load_pair(const uint8_t* at) { return *reinterpret_cast<const uint16_t*>(at); }

/// Those of a unit of eight groups, of which lane (i, p) has groups i and 4 + i: what groups have in common
/// is read once by the four lanes of a pair of rows.
template <Packing p>
struct UnitScales {
  static constexpr int kHalves = 2 * static_cast<int>(kernels::kPackRows);
  float2 d, m;
  uint32_t number[2][2];  ///< two bytes each: scales and minimums of the lane's two groups

  /// All lanes of a warp together.
  __device__ void load(const uint8_t* record, int i, int pair) {
    if constexpr (!kernels::is_super(p)) return;
    d = load_halves(record + 4 * pair);
    if constexpr (kernels::has_minimum(p)) {
      m = load_halves(record + kHalves + 4 * pair);
      // Lane i unpacks numbers i, 4 + i, 8 + i and 12 + i of sixteen; group g's are 2 g and 2 g + 1.
      const uint8_t* six = record + 2 * kHalves + 16 * i + 2 * pair;
      const uint32_t x = load_pair(six), y = load_pair(six + 64), z = load_pair(six + 128);
      const uint32_t first = (x & 0x3F3FU) | (y & 0x3F3FU) << 16;
      const uint32_t fourth = (x >> 6 & 0x0303U) | (y >> 4 & 0x0C0CU) | (z >> 2 & 0x3030U);
      const uint32_t second = (z & 0x3F3FU) | fourth << 16;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int from = (2 * i + k) % 4 * 8 + pair;
        const uint32_t a = __shfl_sync(~0U, first, from), b = __shfl_sync(~0U, second, from);
        number[0][k] = i < 2 ? a & 0xFFFFU : a >> 16;
        number[1][k] = i < 2 ? b & 0xFFFFU : b >> 16;
      }
    }
  }
  /// Of group g = 4 `half` + i of the unit; without super-blocks record is that group's.
  __device__ PairScale of(const uint8_t* record, int half, int g, int pair) const {
    if constexpr (p == Packing::q6_k) {
      const uint32_t s0 = load_pair(record + kHalves + 32 * g + 2 * pair);
      const uint32_t s1 = load_pair(record + kHalves + 32 * g + 16 + 2 * pair);
      const auto low = [](uint32_t x) { return static_cast<float>(static_cast<int8_t>(x)); };
      return {{d.x * low(s0), d.y * low(s0 >> 8)}, {d.x * low(s1), d.y * low(s1 >> 8)}};
    } else if constexpr (kernels::is_super(p)) {
      const uint32_t s = number[half][0], t = number[half][1];
      const auto at = [](uint32_t x) { return static_cast<float>(x & 255U); };
      return {{d.x * at(s), d.y * at(s >> 8)}, {-m.x * at(t), -m.y * at(t >> 8)}};
    } else {
      const float2 scale = load_halves(record + 4 * pair);
      if constexpr (kernels::has_minimum(p)) {
        const float2 minimum = load_halves(record + kHalves + 4 * pair);
        return {{scale.x, scale.y}, {minimum.x, minimum.y}};
      }
      // q8_0's codes have had their zero taken away.
      constexpr float kZero = p == Packing::q8_0 ? 0.0F : 1 << kernels::zero_shift(p);
      return {{scale.x, scale.y}, {-kZero * scale.x, -kZero * scale.y}};
    }
  }
};

/// Calls f.operator()<p>() with the packing as a constant; false if it is none.
template <class F>
bool with_packing(int32_t form, F&& f) {
  switch (static_cast<Packing>(form)) {
    case Packing::q4_0:
      f(std::integral_constant<Packing, Packing::q4_0>());
      return true;
    case Packing::q4_1:
      f(std::integral_constant<Packing, Packing::q4_1>());
      return true;
    case Packing::q5_0:
      f(std::integral_constant<Packing, Packing::q5_0>());
      return true;
    case Packing::q5_1:
      f(std::integral_constant<Packing, Packing::q5_1>());
      return true;
    case Packing::q8_0:
      f(std::integral_constant<Packing, Packing::q8_0>());
      return true;
    case Packing::q4_k:
      f(std::integral_constant<Packing, Packing::q4_k>());
      return true;
    case Packing::q5_k:
      f(std::integral_constant<Packing, Packing::q5_k>());
      return true;
    case Packing::q6_k:
      f(std::integral_constant<Packing, Packing::q6_k>());
      return true;
  }
  return false;
}

}  // namespace narrows::cuda
