// One part of a klt page: kPageTokens tokens of `width` neighbouring key channels and the same value
// channels, as latent codes. A part is all channels of a transform: the whole layer where D is small, a group
// of KV heads where a transform of all of them would cost too much. docs/cache_layout.md draws it. Pipeline
// step 5.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "kernels/latent_page.h"
#include "kv/klt/klt_basis.h"
#include "kv/layout.h"

namespace narrows {

/// Widest transform: beyond, heads are split into parts (measured in docs/experiments.md).
inline constexpr int64_t kMaxTransform = 256;

/// KV heads of a part: the largest divisor of n_head_kv that keeps within kMaxTransform, at least 1.
int64_t heads_of_part(int64_t n_head_kv, int64_t head_dim);

/// A page begins with the set of its anchors (klt_anchor.h), bit t for token t: exact elsewhere, skipped
/// here.
using AnchorBits = uint64_t;
inline constexpr int64_t kPageHeader = sizeof(AnchorBits);

/// Where the sections of a part lie, in bytes from the page's start:
///   key scales [n_key], value scales [n_value]           a byte a coordinate
///   index: key coordinates [0, n_index), each bits x 8   planes of 64 tokens, token t at bit index_slot(t)
///   rows of the other key coordinates [64, rest.bytes]   planes along the coordinates of one token
///   rows of the value coordinates [64, value.bytes]
struct KltLayout {
  int64_t n_key = 0;    ///< key coordinates with bits
  int64_t n_value = 0;  ///< value coordinates with bits
  int64_t n_index = 0;  ///< key coordinates that scoring reads
  kernels::PlaneRow rest;
  kernels::PlaneRow value;
  int64_t offset = 0;
  int64_t index_bytes = 0;

  int64_t scale_offset() const { return offset; }
  int64_t index_offset() const { return offset + n_key + n_value; }
  int64_t rest_offset() const { return index_offset() + index_bytes; }
  int64_t value_offset() const { return rest_offset() + kPageTokens * rest.bytes; }
  int64_t end() const { return value_offset() + kPageTokens * value.bytes; }
};

/// Buffers of reading, for one thread.
struct KltScratch {
  explicit KltScratch(int64_t width);
  bool ok() const {
    return codes.ok() && key_amplitude.ok() && value_amplitude.ok() && key.ok() && value.ok();
  }

  AlignedArray<uint8_t> codes;          ///< expanded index
  AlignedArray<float> key_amplitude;    ///< [ld]
  AlignedArray<float> value_amplitude;  ///< [ld]
  AlignedArray<float> key;              ///< [kPageTokens, ld] latents of a tile
  AlignedArray<float> value;            ///< [kPageTokens, ld]
  int64_t ld = 0;  ///< at least pad_latent(width), and a vector more: the rest of the key begins at any octet
};

class KltPart {
  friend class KltEncoder;

 public:
  /// Channels [first_channel, first_channel + key.width). n_index is cut to the coordinates that have bits.
  KltPart(int64_t first_channel, KltTransform key, KltTransform value, int64_t n_index, int64_t page_offset);

  const KltLayout& layout() const { return layout_; }
  int64_t first_channel() const { return first_channel_; }
  int64_t width() const { return key_.width; }
  /// Its decode is empty: key_transform() has it.
  const KltTransform& key() const { return key_; }
  /// All of it, to write or to encode with; decode is as rebuilding knows it, in bfloat16.
  KltTransform key_transform() const;
  const KltTransform& value() const { return value_; }
  int64_t bytes() const;

  /// Latents of tokens slots [n] of a page into rows [row, row + n) of scratch.key and scratch.value.
  void read_rows(const std::byte* page, const int32_t* slots, int64_t n, int64_t row,
                 KltScratch& scratch) const;
  /// The keys of them alone.
  void read_keys(const std::byte* page, const int32_t* slots, int64_t n, int64_t row,
                 KltScratch& scratch) const;
  /// One token's row of planes of the key coordinates that are not in the index, of shape layout().rest.
  const uint8_t* rest_row(const std::byte* page, int64_t slot) const {
    return reinterpret_cast<const uint8_t*>(page) + layout_.rest_offset() + slot * layout_.rest.bytes;
  }
  /// One token's row of planes of the value, of shape layout().value, and the amplitudes
  /// [pad_latent(n_value)] of its page.
  const uint8_t* value_row(const std::byte* page, int64_t slot) const {
    return reinterpret_cast<const uint8_t*>(page) + layout_.value_offset() + slot * layout_.value.bytes;
  }
  void value_amplitudes(const std::byte* page, float* amplitude) const;

  /// Keys before RoPE of one KV head out of n latent rows: k [n, ldk], channels [channel, channel + count) of
  /// the part.
  void rebuild_keys(const float* latent, int64_t ld, int64_t n, int64_t channel, int64_t count, float* k,
                    int64_t ldk) const;
  /// Values of n latent rows, all channels of the part: v [n, ldv].
  void rebuild_values(const float* latent, int64_t ld, int64_t n, float* v, int64_t ldv) const;
  /// v [count] += sum of weights x mean + latent x decode, for a weighted sum of value latents.
  void rebuild_value(const float* latent, float weight, int64_t channel, int64_t count, float* v) const;

  /// The keys' inverse transform, [n_coord / 2, width]: rows 2 i and 2 i + 1 in bfloat16, the low half first.
  const std::vector<uint32_t>& key_pairs() const { return key_pairs_; }
  const uint8_t* value_scales(const std::byte* page) const { return key_scales(page) + layout_.n_key; }

  // For scoring.
  const uint8_t* index(const std::byte* page) const {
    return reinterpret_cast<const uint8_t*>(page) + layout_.index_offset();
  }
  const uint8_t* key_scales(const std::byte* page) const {
    return reinterpret_cast<const uint8_t*>(page) + layout_.scale_offset();
  }
  /// Of the codes that expand_index() gives with kScoreBits: step by amplitude, and centre; [n_index].
  const std::vector<float>& score_step() const { return score_step_; }
  const std::vector<float>& score_centre() const { return score_centre_; }
  /// What a query is projected with, [width, ld_score()]: column c < n_index is row c of the keys' inverse
  /// transform, column n_index the mean key. In float: the mean may be large.
  const std::vector<float>& score_basis() const { return score_basis_; }
  int64_t ld_score() const { return layout_.n_index + 1; }

 private:
  std::vector<float> decode_of_pairs() const;  ///< [n_coord, width]
  int64_t first_channel_;
  KltTransform key_;
  KltTransform value_;
  KltLayout layout_;
  std::vector<float> score_step_, score_centre_;  ///< [n_index]
  std::vector<float> score_basis_;
  std::vector<uint32_t> key_pairs_;             ///< decode, [n_coord / 2, width] as pack_bf16() writes it
  std::vector<float> full_step_, full_centre_;  ///< [n_index] of all bits
};

/// What a transform does to a centred row: z = (x - mean) project, [width, ldz], a column a coordinate; 0
/// beyond n_coord.
std::vector<float> make_project(const KltTransform& transform, int64_t ldz);

/// Writes pages of a part. Holds what only writing needs, some times the size of the transforms: made for a
/// run of pages, not kept.
class KltEncoder {
 public:
  explicit KltEncoder(const KltPart& part);

  /// Writes kPageTokens tokens: k before RoPE and v, whole rows with `ld` between them. What is stored of
  /// anchors is their mean, so that scales fit the others. False if a number cannot be stored (not finite, or
  /// 8,000 standard deviations away).
  bool encode(const float* k, const float* v, int64_t ld, AnchorBits anchors, std::byte* page);

 private:
  /// z = (x - mean) project, a column a coordinate.
  struct Forward {
    Forward(KltTransform of, int64_t ldz);
    KltTransform transform;
    std::vector<float> project;  ///< [width, ldz]
  };

  bool quantise(const Forward& forward, const float* x, int64_t ld, AnchorBits anchors, uint8_t* scales);
  void write_rows(const uint8_t* octet_bits, const kernels::PlaneRow& shape, int64_t first_octet,
                  uint8_t* rows) const;
  void write_index(uint8_t* planes) const;

  const KltPart& part_;
  int64_t ldz_;
  Forward key_, value_;
  std::vector<float> centred_;   ///< [kPageTokens, width]
  std::vector<float> z_;         ///< [kPageTokens, ldz]
  std::vector<uint8_t> codes_;   ///< [kPageTokens, ldz]
  std::vector<uint8_t> scales_;  ///< [ldz]
};

}  // namespace narrows
