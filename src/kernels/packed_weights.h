// Weights as the products of a decode step read them: rows in tiles of 16, a group of 32 inputs after
// another, so that one instruction multiplies 4 inputs of 16 rows. Made at load from the blocks of a GGUF
// file (pack_weights.cpp), without loss: a packed weight is the number that the file says, and takes as many
// bytes.
//
// A tile is one record after another, each the scales and then the codes of a group (of 8 groups in the "k"
// types), and is read as ONE ascending stream: with scales and codes apart, two streams a thread, the CPU's
// prefetchers gave 12 to 16 GB/s instead of 30 (docs/experiments.md).
//
// Codes of a group, `bits` each:
//   4 bits: 4 vectors of 64 bytes; byte 4 r + t of vector i holds, of row r, input 4 i + t in its low half
//   and
//           input 16 + 4 i + t in its high half.
//   5 bits: those of the low four bits, then 64 bytes: bit j of byte 4 r + t is the fifth bit of input 4 j +
//   t. 6 bits: those of the low four bits, then 2 x 64 bytes: bits 2 j, 2 j + 1 of byte 4 r + t of the first
//   are
//           the upper bits of input 4 j + t, of the second those of input 16 + 4 j + t.
//   8 bits: 8 vectors; byte 4 r + t of vector j is input 4 j + t plus 128.
// Scales of a record, halves unless said otherwise, [16] a row each:
//   q4_0, q5_0, q8_0: d.                            weight = d (code - zero)
//   q4_1, q5_1:       d, m.                         weight = d code + m
//   q4_k, q5_k:       d, m, 192 bytes of 6-bit numbers s_g, t_g.  weight = d s_g code - m t_g
//   q6_k:             d, then [8][2] int8 s.        weight = d s (code - 32), an s for 16 inputs
//   iq4_nl:           d.                            weight = d (t[code] - 128), t: code_table()
//   mxfp4:            [16] bytes e.                 weight = 2^(e - 128) (t[code] - 16)
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace narrows::kernels {

/// Rows of a tile.
inline constexpr int64_t kPackRows = 16;
/// Inputs of a group; the same as in all of GGUF's quantised types.
inline constexpr int64_t kPackGroup = 32;
/// Groups that share d and m in the "k" types.
inline constexpr int64_t kSuperGroups = 8;
/// Bytes of the 6-bit numbers of 8 groups, 16 rows: 16 vectors (s_0, t_0, s_1, ...) of 16 numbers. Vector v <
/// 12 is the low 6 bits of bytes 16 v ..; numbers of vector 12 + i have their bits 0-1, 2-3, 4-5 in the top
/// bits of vectors i, 4 + i, 8 + i.
inline constexpr int64_t kSixBitBytes = 192;

enum class Packing : uint8_t { q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, iq4_nl, mxfp4 };

constexpr int code_bits(Packing p) {
  switch (p) {
    case Packing::q4_0:
    case Packing::q4_1:
    case Packing::q4_k:
    case Packing::iq4_nl:
    case Packing::mxfp4:
      return 4;
    case Packing::q5_0:
    case Packing::q5_1:
    case Packing::q5_k:
      return 5;
    case Packing::q6_k:
      return 6;
    case Packing::q8_0:
      return 8;
  }
  return 0;
}

/// The codes of these stand for the numbers of a table.
constexpr bool has_table(Packing p) { return p == Packing::iq4_nl || p == Packing::mxfp4; }

/// What a code of 4 bits stands for, shifted to be positive: GGUF's table of iq4_nl plus 128; twice the
/// number that is a float of 4 bits (e2m1) plus 16. Vectors are filled with them.
inline constexpr uint8_t kIq4Table[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                          129, 141, 153, 166, 181, 197, 217, 241};
inline constexpr uint8_t kFp4Table[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};
constexpr const uint8_t* code_table(Packing p) { return p == Packing::iq4_nl ? kIq4Table : kFp4Table; }

/// Bits of the numbers that products see: codes, or what the table gives for them.
constexpr int number_bits(Packing p) {
  return p == Packing::iq4_nl ? 8 : p == Packing::mxfp4 ? 5 : code_bits(p);
}

/// log2 of what is taken from a code (or a table's number) before it is scaled; 0: nothing (the types with a
/// minimum).
constexpr int zero_shift(Packing p) {
  switch (p) {
    case Packing::q4_0:
      return 3;
    case Packing::q5_0:
    case Packing::mxfp4:
      return 4;
    case Packing::q6_k:
      return 5;
    case Packing::q8_0:
    case Packing::iq4_nl:
      return 7;
    default:
      return 0;
  }
}

/// Scales of 8 groups with d in common.
constexpr bool is_super(Packing p) { return p == Packing::q4_k || p == Packing::q5_k || p == Packing::q6_k; }

/// A minimum beside the scale.
constexpr bool has_minimum(Packing p) { return zero_shift(p) == 0; }

/// Inputs that a row's count must be a multiple of.
constexpr int64_t inputs_at_once(Packing p) { return is_super(p) ? kPackGroup * kSuperGroups : kPackGroup; }

constexpr int64_t group_code_bytes(Packing p) { return kPackGroup * kPackRows * code_bits(p) / 8; }

/// Bytes of the scales of a record.
constexpr int64_t scale_bytes(Packing p) {
  const int64_t half = kPackRows * 2;
  if (p == Packing::mxfp4) return kPackRows;
  if (p == Packing::q6_k) return half + kSuperGroups * 2 * kPackRows;
  if (is_super(p)) return 2 * half + kSixBitBytes;
  return has_minimum(p) ? 2 * half : half;
}

/// Bytes of a record: of inputs_at_once() inputs of 16 rows.
constexpr int64_t record_bytes(Packing p) {
  return scale_bytes(p) + inputs_at_once(p) / kPackGroup * group_code_bytes(p);
}

constexpr int64_t tile_bytes(Packing p, int64_t n_in) { return n_in / inputs_at_once(p) * record_bytes(p); }

constexpr int64_t pack_tiles(int64_t n_row) { return (n_row + kPackRows - 1) / kPackRows; }

/// The scale of an mxfp4 group as the bits of a float: 2^(e - 128), half of what the format says, since the
/// table is of doubles.
constexpr uint32_t mxfp4_scale_bits(uint32_t e) { return e < 2 ? (e + 1) << 21U : (e - 1) << 23U; }

/// A matrix [n_out, n_in] in tiles; rows of the last tile beyond n_out are zeros.
struct PackedMatrix {
  Packing packing;
  int64_t n_in;
  int64_t n_out;
  const uint8_t* tiles;  ///< [pack_tiles(n_out)][tile_bytes(packing, n_in)]
};

/// Rows of inputs rounded to 8 bits in groups of 32: x = scale * code, code in [-127, 127];
/// a scale of NaN stands for a group with numbers that are not finite.
struct ByteRows {
  int8_t* code;         ///< [n_row, n_in], 4-byte aligned
  float* scale;         ///< [n_row, n_in / 32]
  float* total;         ///< [n_row, n_in / 32] scale * the sum of a group's codes
  int32_t* minus;       ///< [n_row, n_in / 32] minus the sum of a group's codes
  int32_t* minus_half;  ///< [n_row, n_in / 16] minus the sum of half a group's codes
};

/// Group `at` of rows whose numbers are not all finite: products with it are NaN.
inline void put_no_number(const ByteRows& rows, int64_t at) {
  std::memset(rows.code + at * kPackGroup, 0, kPackGroup);
  rows.scale[at] = rows.total[at] = std::numeric_limits<float>::quiet_NaN();
  rows.minus[at] = rows.minus_half[2 * at] = rows.minus_half[2 * at + 1] = 0;
}

}  // namespace narrows::kernels
