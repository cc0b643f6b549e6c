// One bfloat16 at a time, in integer arithmetic: a float without its low 16 bits.
#pragma once

#include <bit>
#include <cstdint>

namespace narrows::kernels {

/// Bits of the nearest bfloat16, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

/// x rounded to bfloat16.
inline float round_to_bf16(float x) { return bf16_to_float(float_to_bf16(x)); }

}  // namespace narrows::kernels
