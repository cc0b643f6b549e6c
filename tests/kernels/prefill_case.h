// Cases of the prefill kernels' tests: which rows see which keys, the numbers, packing them, the call.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/kernel_test.h"

namespace narrows::kernels {

struct PrefillCase {
  int64_t n_row;
  int64_t head_dim;
  int64_t first = 0;  ///< position of row 0
  int64_t window = 0;
  int64_t begin = 0;
  int64_t end = -1;                ///< -1: first + n_row
  float sigma = 1;                 ///< of the queries: 20 makes sharp distributions
  float common = 0;                ///< added to every coordinate of every key and query
  int64_t gap = 0;                 ///< between rows
  int64_t step = 1;                ///< positions from row to row
  std::vector<uint8_t> skip = {};  ///< tiles that are not read; empty: none

  int64_t n_key() const { return end < 0 ? first + (n_row - 1) * step + 1 : end; }
  int64_t seen_begin(int64_t r) const {
    return std::max(begin, window > 0 ? first + r * step + 1 - window : 0);
  }
  int64_t seen_end(int64_t r) const { return std::min(n_key(), first + r * step + 1); }
  bool skips(int64_t key) const {
    return !skip.empty() && skip[static_cast<size_t>(key / kPrefillTile)] != 0;
  }
};

struct PrefillInputs {
  int64_t ld;
  Array<float> q, k, v;
};

inline PrefillInputs make_inputs(const PrefillCase& c, Random& random) {
  const int64_t ld = c.head_dim + c.gap;
  PrefillInputs in{ld, Array<float>((c.n_row - 1) * ld + c.head_dim),
                   Array<float>((c.n_key() - 1) * ld + c.head_dim),
                   Array<float>((c.n_key() - 1) * ld + c.head_dim)};
  fill_normal(in.q, c.n_row, c.head_dim, ld, random, c.sigma);
  fill_normal(in.k, c.n_key(), c.head_dim, ld, random);
  fill_normal(in.v, c.n_key(), c.head_dim, ld, random);
  for (int64_t r = 0; r < c.n_row; ++r) {
    for (int64_t d = 0; d < c.head_dim; ++d) in.q[r * ld + d] += c.common;
  }
  for (int64_t j = 0; j < c.n_key(); ++j) {
    for (int64_t d = 0; d < c.head_dim; ++d) in.k[j * ld + d] += c.common;
  }
  return in;
}

inline std::vector<std::byte> pack(const PrefillKernel& kernel, const PrefillCase& c, const PrefillInputs& in,
                                   float scale) {
  const int64_t bytes = kernel.tile_bytes(c.head_dim), n_tile = (c.n_key() + kPrefillTile - 1) / kPrefillTile;
  std::vector<std::byte> tiles(static_cast<size_t>(n_tile * bytes));
  for (int64_t t = 0; t < n_tile; ++t) {
    const int64_t at = t * kPrefillTile;
    kernel.pack(in.k.data() + at * in.ld, in.ld, in.v.data() + at * in.ld, in.ld,
                std::min(kPrefillTile, c.n_key() - at), c.head_dim, scale, tiles.data() + t * bytes);
  }
  return tiles;
}

inline PrefillRows rows_of(const PrefillCase& c, const PrefillInputs& in, const std::vector<std::byte>& tiles,
                           float scale, Array<float>& out, Scratch& scratch) {
  PrefillRows rows;
  rows.q = in.q.data();
  rows.ldq = in.ld;
  rows.n_row = c.n_row;
  rows.head_dim = c.head_dim;
  rows.tiles = tiles.data();
  rows.begin = c.begin;
  rows.end = c.n_key();
  rows.first = c.first;
  rows.step = c.step;
  rows.window = c.window;
  if (!c.skip.empty()) rows.skip = c.skip.data();
  rows.scale = scale;
  rows.out = out.data();
  rows.ldo = in.ld;
  rows.scratch = static_cast<std::byte*>(scratch.get());
  return rows;
}

/// Packs and attends; out [n_row, ld], gaps stay NaN.
inline Array<float> attend(const PrefillKernel& kernel, const PrefillCase& c, const PrefillInputs& in,
                           float scale) {
  const std::vector<std::byte> tiles = pack(kernel, c, in, scale);
  Array<float> out((c.n_row - 1) * in.ld + c.head_dim);
  Scratch scratch(kernel.scratch_bytes(c.head_dim));
  kernel.attend(rows_of(c, in, tiles, scale, out, scratch));
  return out;
}

}  // namespace narrows::kernels
