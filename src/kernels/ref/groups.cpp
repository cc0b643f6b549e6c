// Oracle: asymmetric groups of kGroup values with 2 or 4 bits a code (KIVI, arXiv:2402.02750). The rule is
// stated in float, not double, so that every target writes the same bytes: a cache snapshot may move between
// machines.
#include <cmath>

#include "kernels/half.h"
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {
namespace {

/// One group of n <= kGroup values; false if one of them is NaN or beyond the range of f16.
bool quantise_group(const float* x, int64_t n, int bits, uint8_t* code, f16_t* param) {
  const int64_t width = kGroup * bits / 8;
  const float top_code = static_cast<float>((1 << bits) - 1);
  float low = x[0];
  float high = x[0];
  for (int64_t i = 0; i < n; ++i) {
    if (!(std::fabs(x[i]) <= kHalfMax)) return false;
    low = std::fmin(low, x[i]);
    high = std::fmax(high, x[i]);
  }
  low += 0.0F;  // -0 becomes +0: which of them a minimum returns depends on the target
  high += 0.0F;
  param[0] = float_to_half((high - low) / top_code);
  param[1] = float_to_half(low);
  const float scale = half_to_float(param[0]);
  const float zero = half_to_float(param[1]);
  for (int64_t b = 0; b < width; ++b) code[b] = 0;
  if (scale == 0) return true;
  for (int64_t i = 0; i < n; ++i) {
    // Rounding of zero and scale can push the quotient past either end; nearbyint: ties to even.
    const float nearest = std::nearbyint((x[i] - zero) / scale);
    const int c = static_cast<int>(std::fmin(std::fmax(nearest, 0.0F), top_code));
    code[i % width] = static_cast<uint8_t>(code[i % width] | (c << (i / width * bits)));
  }
  return true;
}

}  // namespace

bool quant_groups(const float* x, int64_t n, int bits, uint8_t* codes, f16_t* params) {
  const int64_t width = kGroup * bits / 8;
  for (int64_t g = 0; g * kGroup < n; ++g) {
    const int64_t left = n - g * kGroup;
    const int64_t n_here = left < kGroup ? left : kGroup;
    if (!quantise_group(x + g * kGroup, n_here, bits, codes + g * width, params + 2 * g)) return false;
  }
  return true;
}

void dequant_groups(const uint8_t* codes, const f16_t* params, int64_t n, int bits, float* y) {
  const int64_t width = kGroup * bits / 8;
  const int mask = (1 << bits) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t g = i / kGroup;
    const int64_t in_group = i % kGroup;
    const int code = (codes[g * width + in_group % width] >> (in_group / width * bits)) & mask;
    const double scale = half_to_float(params[2 * g]);
    const double zero = half_to_float(params[2 * g + 1]);
    y[i] = static_cast<float>(zero + scale * code);
  }
}

}  // namespace narrows::kernels::ref
