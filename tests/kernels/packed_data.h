// Random weights in the file's blocks, packed, and random inputs as byte rows.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/kernel_test.h"
#include "kernels/pack_weights.h"

namespace narrows::kernels {

inline constexpr Packing kAllPackings[] = {Packing::q4_0,   Packing::q4_1, Packing::q5_0, Packing::q5_1,
                                           Packing::q8_0,   Packing::q4_k, Packing::q5_k, Packing::q6_k,
                                           Packing::iq4_nl, Packing::mxfp4};

inline std::string packing_name(Packing p) {
  static const char* const names[] = {"q4_0", "q4_1", "q5_0", "q5_1",   "q8_0",
                                      "q4_k", "q5_k", "q6_k", "iq4_nl", "mxfp4"};
  return names[static_cast<int>(p)];
}

/// A matrix with random codes and small scales; those of the blocks' d and m are drawn from `halves`.
struct Packed {
  std::vector<uint8_t> file;  ///< [n_out, file_row_bytes]
  Array<uint8_t> tiles;       ///< ends where the last tile does
  PackedMatrix matrix;

  Packed(Packing p, int64_t n_in, int64_t n_out, const std::vector<float>& halves, Random& random)
      : file(static_cast<size_t>(n_out * file_row_bytes(p, n_in))),
        tiles(pack_tiles(n_out) * tile_bytes(p, n_in), 0),
        matrix{p, n_in, n_out, tiles.data()} {
    std::uniform_int_distribution<int> byte(0, 255);
    for (uint8_t& b : file) b = static_cast<uint8_t>(byte(random));
    const int64_t block = file_row_bytes(p, inputs_at_once(p));
    std::uniform_int_distribution<size_t> pick(0, halves.size() - 1);
    for (int64_t at = 0; at < static_cast<int64_t>(file.size()); at += block) {
      if (p == Packing::mxfp4) {  // a power of two that is no larger; it has no 0
        const float half = std::fabs(halves[pick(random)]);
        file[static_cast<size_t>(at)] = static_cast<uint8_t>(128 + (half == 0 ? -4 : std::ilogb(half)));
        continue;
      }
      const int64_t first = p == Packing::q6_k ? 208 : 0, n_half = has_minimum(p) ? 2 : 1;
      for (int64_t i = 0; i < n_half; ++i) {
        const f16_t half = float_to_half(halves[pick(random)]);
        std::memcpy(file.data() + at + first + 2 * i, &half, sizeof(half));
      }
    }
    for (int64_t t = 0; t < pack_tiles(n_out); ++t) {
      const uint8_t* rows[kPackRows] = {};
      for (int64_t r = 0; r < kPackRows && t * kPackRows + r < n_out; ++r) {
        rows[r] = file.data() + (t * kPackRows + r) * file_row_bytes(p, n_in);
      }
      pack_tile(p, n_in, rows, tiles.data() + t * tile_bytes(p, n_in));
    }
  }
};

/// Byte rows with memory of their own, each array ending where its numbers do.
struct Bytes {
  Array<int8_t> code;
  Array<float> scale, total;
  Array<int32_t> minus, minus_half;

  Bytes(int64_t n_row, int64_t n_in)
      : code(n_row * n_in, 4),
        scale(n_row * n_in / kPackGroup),
        total(n_row * n_in / kPackGroup),
        minus(n_row * n_in / kPackGroup),
        minus_half(n_row * n_in / kPackGroup * 2) {}
  ByteRows rows() { return {code.data(), scale.data(), total.data(), minus.data(), minus_half.data()}; }
  /// From row r on.
  ByteRows from(int64_t r, int64_t n_in) {
    const int64_t g = n_in / kPackGroup;
    return {code.data() + r * n_in, scale.data() + r * g, total.data() + r * g, minus.data() + r * g,
            minus_half.data() + r * g * 2};
  }
};

}  // namespace narrows::kernels
