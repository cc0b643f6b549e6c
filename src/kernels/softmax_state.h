// Algebra of the online-softmax state (SoftmaxRows): empty, merge, normalise. Decode merges one state a
// thread, prefill tiles update one in place. (Milakov & Gimelshein, arXiv:1805.02867.)
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/ops.h"

namespace narrows::kernels {

inline void softmax_clear(const SoftmaxRows& s, int64_t n_row, int64_t head_dim) {
  for (int64_t i = 0; i < n_row; ++i) {
    s.max[i] = -std::numeric_limits<float>::infinity();
    s.sum[i] = 0;
  }
  for (int64_t i = 0; i < n_row * head_dim; ++i) s.out[i] = 0;
}

/// into := into merged with from. Two empty rows stay empty: -inf - -inf would be NaN, hence the test.
inline void softmax_merge(const SoftmaxRows& into, const SoftmaxRows& from, int64_t n_row, int64_t head_dim) {
  for (int64_t i = 0; i < n_row; ++i) {
    if (from.sum[i] == 0) continue;
    const float top = std::fmax(into.max[i], from.max[i]);
    const float a = into.sum[i] == 0 ? 0.0F : std::exp(into.max[i] - top);
    const float b = std::exp(from.max[i] - top);
    into.max[i] = top;
    into.sum[i] = a * into.sum[i] + b * from.sum[i];
    float* out = into.out + i * head_dim;
    const float* other = from.out + i * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) out[d] = a * out[d] + b * other[d];
  }
}

/// y [n_row, head_dim] = out / sum; an empty row (all keys masked) gives zeros. y may be s.out.
inline void softmax_normalise(const SoftmaxRows& s, int64_t n_row, int64_t head_dim, float* y) {
  for (int64_t i = 0; i < n_row; ++i) {
    const float inv = s.sum[i] > 0 ? 1.0F / s.sum[i] : 0.0F;
    for (int64_t d = 0; d < head_dim; ++d) y[i * head_dim + d] = s.out[i * head_dim + d] * inv;
  }
}

}  // namespace narrows::kernels
