// One half-precision value at a time: IEEE binary16 bits <-> float, in integer arithmetic, so that the answer
// does not depend on the target or the rounding mode. Used by the oracle (ref/) and for the parameters of a
// group.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/ops.h"

namespace narrows::kernels {

/// Largest finite half.
inline constexpr float kHalfMax = 65504.0F;

inline float half_to_float(f16_t half) {
  const uint32_t sign = (uint32_t{half} & 0x8000U) << 16;
  const uint32_t rest = uint32_t{half} & 0x7FFFU;
  uint32_t bits = 0;
  if (rest >= 0x7C00U) {  // infinity, or NaN with its payload, made quiet as the hardware does
    bits = 0x7F800000U | (rest << 13) | (rest > 0x7C00U ? 0x00400000U : 0U);
  } else if (rest >= 0x0400U) {
    bits = (rest << 13) + 0x38000000U;  // exponent bias 15 -> 127
  } else {
    bits = std::bit_cast<uint32_t>(static_cast<float>(rest) * 0x1p-24F);  // zero and subnormals, exact
  }
  return std::bit_cast<float>(sign | bits);
}

/// To nearest, ties to even; 65520 and above give infinity; NaN stays NaN.
inline f16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t rest = bits & 0x7FFFFFFFU;
  uint32_t half = 0;
  if (rest > 0x7F800000U) {
    half = 0x7E00U | ((rest >> 13) & 0x3FFU);
  } else if (rest >= 0x477FF000U) {  // 65520 = half way between 65504 and 65536: the tie goes to even, up
    half = 0x7C00U;
  } else if (rest <
             0x38800000U) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24, the subnormal step
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5F) - 0x3F000000U;
  } else {
    half = (rest + 0xFFFU + ((rest >> 13) & 1U) - 0x38000000U) >> 13;
  }
  return static_cast<f16_t>(sign | half);
}

}  // namespace narrows::kernels
