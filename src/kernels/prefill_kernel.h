// Attention of a prompt behind one interface, whatever the precision: keys and values are packed once a
// layer, tile by tile, into the layout that a kernel wants; then blocks of query rows attend to the tiles.
// One PrefillKernel a precision in every target's table (ops.h).
//
// The online softmax never holds more than kQueryRows x kPrefillTile scores. Formats, algebra and error
// bounds: docs/half_precision.md.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace narrows::kernels {

/// Tokens in a packed tile. It is also the block whose mean key is taken away (PASA's s2 = 128): long enough
/// that the mean costs nothing, short enough that it follows the slow turns of RoPE.
inline constexpr int64_t kPrefillTile = 128;

/// Rows that a kernel works on together, so that a tile is read from memory once for all of them. Callers
/// split work into tasks of a multiple of it.
inline constexpr int64_t kQueryRows = 128;

/// In the order of narrows::PrefillAttention, which has `automatic` before them.
enum class PrefillKind { f32, bf16, bf16_shift, fp16, pasa, fp16_shift };
inline constexpr int kPrefillKinds = 6;

/// Most rows of one PrefillKernel::look().
inline constexpr int64_t kLookRows = 32;

/// Query positions of ONE query head, and the keys that they see. Row r is at position p = first + r * step
/// and sees key j if begin <= j < end, j <= p, with window > 0 j > p - window, and the tile of j is not
/// skipped.
struct PrefillRows {
  const float* q = nullptr;  ///< [n_row, ldq], rotated, not scaled
  int64_t ldq = 0;
  int64_t n_row = 0;
  int64_t head_dim = 0;
  const std::byte* tiles = nullptr;  ///< tile t, keys from t * kPrefillTile on, at t * tile_bytes(head_dim)
  int64_t begin = 0;
  int64_t end = 0;    ///< all keys before it are packed
  int64_t first = 0;  ///< position of row 0; end or more: no causal mask
  int64_t step = 1;
  int64_t window = 0;
  const uint8_t* skip = nullptr;  ///< null, or a flag for each tile up to `end`: not 0, it is not read
  float scale = 1;                ///< on q.k
  float* out = nullptr;           ///< [n_row, ldo]; a row that sees no key is 0
  int64_t ldo = 0;
  /// Null, or [n_row]: then out is not divided by the sum, and (max, sum, out) is the state of SoftmaxRows,
  /// which softmax_state.h merges with that of other keys.
  float* max = nullptr;
  float* sum = nullptr;
  std::byte* scratch = nullptr;  ///< scratch_bytes(head_dim), 64-byte aligned

  /// Row r sees keys [seen_begin, seen_end) of tiles that are not skipped.
  int64_t seen_begin(int64_t r) const {
    return std::max({int64_t{0}, begin, window > 0 ? first + r * step + 1 - window : 0});
  }
  int64_t seen_end(int64_t r) const { return std::min(end, first + r * step + 1); }
  bool skips(int64_t tile) const { return skip != nullptr && skip[tile] != 0; }
};

struct PrefillKernel {
  int64_t (*tile_bytes)(int64_t head_dim);

  /// One tile of n <= kPrefillTile tokens of one KV head: k [n, ldk] rotated, v [n, ldv]. A tile that is not
  /// full can only be the last; it is packed anew when tokens are added. scale is that of PrefillRows. A key
  /// or value that is not finite (or beyond the range of the format) spoils every row that sees its tile.
  void (*pack)(const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t n, int64_t head_dim,
               float scale, std::byte* tile);

  int64_t (*scratch_bytes)(int64_t head_dim);

  void (*attend)(const PrefillRows& rows);

  /// Only which tiles the rows look at: share [tiles up to end, kLookRows], the part of the softmax of row r
  /// that falls on the keys of tile t; 0 where it sees none, NaN where something is not finite. n_row <=
  /// kLookRows; reads neither skip nor max and sum, and writes no out. Null: the kernel cannot.
  void (*look)(const PrefillRows& rows, float* share);
};

}  // namespace narrows::kernels
