// Transposes of f16 tiles: rows a token in (from memory that need not be one matrix), columns a token out.
// Attention and the rebuild of keys want columns; projections and values come in rows. Moves bits, so it is
// exact.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/ops.h"

namespace narrows {

namespace transpose_detail {

using Half8 = uint16_t __attribute__((vector_size(16)));

/// 8 x 8 by three rounds of interleaving: a vector of the compiler's, which becomes SSE2 or NEON without
/// intrinsics. 0.3 cycles an element where one by one takes 2.
inline void block8(const kernels::f16_t* const* rows, int64_t column, kernels::f16_t* y, int64_t ld) {
  Half8 a[8];
  Half8 b[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&a[i], rows[i] + column, sizeof(Half8));
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {  // a perfect shuffle of the rows, three times, is the transpose
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; ++i) a[i] = b[i];
  }
  for (int i = 0; i < 8; ++i) std::memcpy(y + i * ld, &a[i], sizeof(Half8));
}

}  // namespace transpose_detail

/// y [n_column, ld] = the n rows at rows[..], transposed: y[c * ld + r] = rows[r][c].
inline void transpose_rows(const kernels::f16_t* const* rows, int64_t n, int64_t n_column, kernels::f16_t* y,
                           int64_t ld) {
  const int64_t n8 = n / 8 * 8;
  const int64_t c8 = n_column / 8 * 8;
  for (int64_t r = 0; r < n8; r += 8) {
    for (int64_t c = 0; c < c8; c += 8) transpose_detail::block8(rows + r, c, y + c * ld + r, ld);
  }
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = r < n8 ? c8 : 0; c < n_column; ++c) y[c * ld + r] = rows[r][c];
  }
}

}  // namespace narrows
