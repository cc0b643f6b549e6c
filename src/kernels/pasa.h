// What PASA (arXiv:2503.01873) does to the keys of a tile, in half precision: every key less beta times the
// tile's mean key, times the softmax scale, as ONE product with a matrix M of kPrefillTile rows. Shared by
// the scalar and the SIMD kernels; docs/half_precision.md has the algebra.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/half.h"
#include "kernels/prefill_kernel.h"

namespace narrows::kernels {

inline float round_to_half(float x) { return half_to_float(float_to_half(x)); }

/// Columns that a matrix unit sums in float32 before its half-precision accumulator is rounded.
inline constexpr int64_t kHalfChunk = 16;

/// Products that fp16_shift sums in half where the CPU computes in half; such sums are added in float32. Of
/// scores no more than two, since they stand in an exponent: four cost half again the error on heads with
/// large scores (docs/half_precision.md).
inline constexpr int64_t kNativeScores = 2;
inline constexpr int64_t kNativeValues = 16;

/// What a product of the kernels computes.
enum class HalfSum { scores, values };

/// M = scale (I - beta/n J) after rounding: `diagonal` on the diagonal, `rest` elsewhere.
struct PasaMatrix {
  float diagonal;
  float rest;
  float recovery;  ///< beta / (1 - beta) of the beta that this M applies, rounded: it undoes the shift
};

/// Rounding M changes the beta that it applies, and the recovery multiplies what is left of that by up to
/// 1 / (1 - beta). So beta is the fixed point of "round M, see which beta that is", with the scale inside:
/// without it (as published) M is not the matrix that is applied, and at head_dim 128 the recovery is up to
/// 1.4% off. The start, 1 - 1/16, makes scores 16 times smaller and the recovery 15; betas nearer to 1
/// amplify the rounding of row means more.
inline PasaMatrix pasa_matrix(float scale) {
  constexpr double n = kPrefillTile;
  double beta = 1 - 0x1p-4;
  PasaMatrix m{};
  for (int i = 0; i < 100; ++i) {
    m.diagonal = round_to_half(static_cast<float>(double{scale} * (1 - beta / n)));
    m.rest = round_to_half(static_cast<float>(-double{scale} * beta / n));
    const double applied = -double{m.rest} * n / (double{m.diagonal} - double{m.rest});
    const bool fixed = std::fabs(applied - beta) < 1e-12;
    beta = applied;
    if (fixed) break;
  }
  m.recovery = round_to_half(static_cast<float>(beta / (1 - beta)));
  return m;
}

/// Row j of M k, coordinates [first, first + n), n <= kHalfChunk, to y: a half-precision product. k holds
/// n_key rows of halves (as floats are rounded here); missing ones repeat the last, so that they don't pull
/// the mean.
inline void pasa_key(const PasaMatrix& m, const float* k, int64_t ldk, int64_t n_key, int64_t j,
                     int64_t first, int64_t n, float* y) {
  float sum[kHalfChunk] = {};
  for (int64_t c = 0; c < kPrefillTile; c += kHalfChunk) {
    float part[kHalfChunk] = {};
    for (int64_t i = c; i < c + kHalfChunk; ++i) {
      const float factor = i == j ? m.diagonal : m.rest;
      const float* row = k + std::min(i, n_key - 1) * ldk + first;
      for (int64_t d = 0; d < n; ++d) part[d] += factor * round_to_half(row[d]);
    }
    for (int64_t d = 0; d < n; ++d) sum[d] = round_to_half(sum[d] + part[d]);
  }
  std::copy_n(sum, n, y);
}

}  // namespace narrows::kernels
