// Where every number of the cache lies: the only place that computes an index into an exact block or an
// encoded page, and that says which token is in which of them. docs/cache_layout.md draws it. Pipeline
// step 5.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/ops.h"
#include "narrows/config.h"

namespace narrows {

/// Tokens of an encoded page: one tile of attention work, so that a page is scored by one product.
inline constexpr int64_t kPageTokens = kernels::kTile;

/// Tokens of an exact block in sinks and recent windows. Small, because a block is allocated whole.
inline constexpr int64_t kWindowBlock = 16;

static_assert(kSegmentTokens % kPageTokens == 0);

/// Tokens of an exact block in an f16 layer: a full attention tile.
inline constexpr int64_t kDenseBlock = kernels::kTile;

/// Largest head_dim: bounds stack buffers of one head's row. The largest in use by GGUF models is 256.
inline constexpr int64_t kMaxHeadDim = 512;

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
/// The next multiple of unit, n itself if it is one.
inline constexpr int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

namespace layout_detail {

/// Byte `offset` of a page as T; const if the page is.
template <class T, class Byte>
auto* field(Byte* page, int64_t offset) {
  static_assert(sizeof(Byte) == 1);
  using Field = std::conditional_t<std::is_const_v<Byte>, const T, T>;
  return reinterpret_cast<Field*>(page + offset);
}

}  // namespace layout_detail

/// A block of exact tokens, all f16: keys ROTATED and transposed [n_head_kv, head_dim, block], a column a
/// token, then values [n_head_kv, block, head_dim]. Per KV head, because attention reads one head at a time.
struct ExactLayout {
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;
  int64_t block = 0;

  int64_t bytes() const { return 2 * n_head_kv * head_dim * block * int64_t{sizeof(kernels::f16_t)}; }

  /// [head_dim, block] of one KV head.
  template <class Byte>
  auto* key_t(Byte* b, int64_t head) const {
    return layout_detail::field<kernels::f16_t>(b, 0) + head * head_dim * block;
  }
  /// [block, head_dim] of one KV head.
  template <class Byte>
  auto* value(Byte* b, int64_t head) const {
    return layout_detail::field<kernels::f16_t>(b, 0) + (n_head_kv + head) * head_dim * block;
  }
};

/// Quantised values of a page of tokens, part of SALS and KIVI pages: codes [kPageTokens, code_bytes], then
/// params [kPageTokens, n_group, 2] (f16 scale, zero). Groups run along the D channels of one token (KIVI's
/// per-token values); the last group of a row may be short but takes a whole group's bytes.
struct ValueLayout {
  int64_t width = 0;   ///< D
  int bits = 0;        ///< 2 or 4
  int64_t offset = 0;  ///< of the codes in the page

  int64_t n_group() const { return ceil_div(width, kernels::kGroup); }
  int64_t code_bytes() const { return n_group() * kernels::kGroup * bits / 8; }
  int64_t bytes() const {
    return kPageTokens * (code_bytes() + n_group() * 2 * int64_t{sizeof(kernels::f16_t)});
  }

  template <class Byte>
  auto* codes(Byte* page, int64_t slot) const {
    return layout_detail::field<uint8_t>(page, offset + slot * code_bytes());
  }
  template <class Byte>
  auto* params(Byte* page, int64_t slot) const {
    return layout_detail::field<kernels::f16_t>(page, offset + kPageTokens * code_bytes()) +
           slot * n_group() * 2;
  }
};

/// A SALS page: index part f16 [rank_score, kPageTokens] (coordinate-major: a page is scored as a row vector
/// times this matrix, without horizontal sums), the other coordinates f16 [kPageTokens, rank - rank_score]
/// (token-major: read only for selected tokens), then the values. Each part is a multiple of 64 bytes.
struct SalsLayout {
  int64_t width = 0;
  int64_t rank = 0;
  int64_t rank_score = 0;
  ValueLayout values;

  SalsLayout() = default;
  SalsLayout(int64_t width_in, int64_t rank_divisor, int value_bits)
      : width(width_in),
        rank(std::max<int64_t>(1, width_in / rank_divisor)),
        rank_score(std::max<int64_t>(1, rank / 2)),  // r* = 0.5 r in the paper
        values{width_in, value_bits, kPageTokens * rank * int64_t{sizeof(kernels::f16_t)}} {}

  int64_t n_rest() const { return rank - rank_score; }
  int64_t bytes() const { return values.offset + values.bytes(); }

  /// [rank_score, kPageTokens]
  template <class Byte>
  auto* index(Byte* page) const {
    return layout_detail::field<kernels::f16_t>(page, 0);
  }
  /// [rank - rank_score] of one token.
  template <class Byte>
  auto* rest(Byte* page, int64_t slot) const {
    return layout_detail::field<kernels::f16_t>(page, 0) + rank_score * kPageTokens + slot * n_rest();
  }
};

/// A KIVI page: key codes [D, n_unit, kGroup * bits / 8], key params f16 [D, n_unit, 2], then the values. A
/// key group is kGroup consecutive tokens of one channel, so a run of channels decodes to [channels,
/// kPageTokens]: a transposed key tile in one call.
struct KiviLayout {
  static constexpr int64_t kUnits = kPageTokens / kernels::kGroup;

  int64_t width = 0;
  int key_bits = 0;
  ValueLayout values;

  KiviLayout() = default;
  KiviLayout(int64_t width_in, int key_bits_in, int value_bits)
      : width(width_in), key_bits(key_bits_in), values{width_in, value_bits, 0} {
    values.offset = width * kUnits * (unit_bytes() + 2 * int64_t{sizeof(kernels::f16_t)});
    // Rounded up to whole cache lines: D * kUnits * 4 alone need not be.
    values.offset = ceil_div(values.offset, 64) * 64;
  }

  int64_t unit_bytes() const { return kernels::kGroup * key_bits / 8; }
  int64_t bytes() const { return values.offset + values.bytes(); }

  template <class Byte>
  auto* key_codes(Byte* page, int64_t channel, int64_t unit) const {
    return layout_detail::field<uint8_t>(page, (channel * kUnits + unit) * unit_bytes());
  }
  template <class Byte>
  auto* key_params(Byte* page, int64_t channel, int64_t unit) const {
    return layout_detail::field<kernels::f16_t>(page, width * kUnits * unit_bytes()) +
           (channel * kUnits + unit) * 2;
  }
};

/// Which token lives where: sinks are positions [0, n_sink), pages hold [n_sink, n_sink + in_pages(n)), the
/// window the rest.
struct WindowPlan {
  int64_t n_sink = 0;
  int64_t n_recent = 0;
  int64_t unit = 0;  ///< tokens encoded at a time

  /// A prompt comes in segments, each but the last ended by KvLayer::seal(): only sealing begins to
  /// encode, at n_exact tokens or more, or a step from n_exact_step tokens on. What the cache holds at the
  /// end of a segment then depends on the tokens before it alone, not on what follows or when it came.
  bool segmented = false;
  int64_t n_exact = 0;
  int64_t n_exact_step = 0;

  /// Tokens in pages of n: whole units, all older than the last n_recent. The newest token always stays
  /// exact: when a step begins it is not there yet.
  int64_t in_pages(int64_t n) const {
    const int64_t old = n - n_sink - std::max<int64_t>(n_recent, 1);
    return old > 0 ? old / unit * unit : 0;
  }
};

}  // namespace narrows
