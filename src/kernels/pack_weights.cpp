// Blocks of the file, by GGUF's definition (32 weights of a "0"/"1" type, 256 of a "k" type), one group of
// one row at a time: its codes as bytes, its scales; then both to their places in the tile.
#include "kernels/pack_weights.h"

#include <bit>
#include <cstring>

#include "kernels/half.h"

namespace narrows::kernels {
namespace {

/// Where the parts of a block begin.
struct BlockShape {
  int64_t bytes;
  int64_t high;   ///< bits beyond the low four
  int64_t codes;  ///< low four bits, or whole codes of q8_0
};

BlockShape block_shape(Packing p) {
  switch (p) {
    case Packing::q4_0:
      return {18, 0, 2};
    case Packing::q4_1:
      return {20, 0, 4};
    case Packing::q5_0:
      return {22, 2, 6};
    case Packing::q5_1:
      return {24, 4, 8};
    case Packing::q8_0:
      return {34, 0, 2};
    case Packing::q4_k:
      return {144, 0, 16};
    case Packing::q5_k:
      return {176, 16, 48};
    case Packing::q6_k:
      return {210, 128, 0};
    case Packing::iq4_nl:
      return {18, 0, 2};
    case Packing::mxfp4:
      return {17, 0, 1};
  }
  return {};
}

uint8_t byte(uint32_t x) { return static_cast<uint8_t>(x); }

/// Codes [32] of group g of a row.
void read_codes(Packing p, const uint8_t* row, int64_t g, uint8_t* code) {
  const BlockShape shape = block_shape(p);
  const uint8_t* block = row + g * kPackGroup / inputs_at_once(p) * shape.bytes;
  const int64_t in_super = g % kSuperGroups;
  const uint8_t* low = block + shape.codes;
  const uint8_t* high = block + shape.high;
  switch (p) {
    case Packing::q8_0:
      for (int i = 0; i < 32; ++i) code[i] = byte(low[i] ^ 0x80U);
      return;
    case Packing::q4_0:
    case Packing::q4_1:
    case Packing::q5_0:
    case Packing::q5_1:
    case Packing::iq4_nl:
    case Packing::mxfp4:
      for (int i = 0; i < 16; ++i) {
        code[i] = byte(low[i] & 15U);
        code[16 + i] = byte(low[i] >> 4U);
      }
      if (shape.high != 0) {
        uint32_t bits = 0;
        std::memcpy(&bits, high, sizeof(bits));
        for (int i = 0; i < 32; ++i) code[i] = byte(code[i] | (bits >> i & 1U) << 4U);
      }
      return;
    case Packing::q4_k:
    case Packing::q5_k:  // two groups share 32 bytes
      low += in_super / 2 * 32;
      for (int i = 0; i < 32; ++i) code[i] = byte(in_super % 2 == 0 ? low[i] & 15U : low[i] >> 4U);
      if (shape.high != 0) {
        for (int i = 0; i < 32; ++i) code[i] = byte(code[i] | (high[i] >> in_super & 1U) << 4U);
      }
      return;
    case Packing::q6_k: {  // four groups share 64 + 32 bytes
      low += in_super / 4 * 64 + in_super % 2 * 32;
      high += in_super / 4 * 32;
      const int64_t which = in_super % 4;
      for (int i = 0; i < 32; ++i) {
        const uint32_t four = which < 2 ? low[i] & 15U : low[i] >> 4U;
        code[i] = byte(four | (high[i] >> (2 * which) & 3U) << 4U);
      }
      return;
    }
  }
}

/// Number i = 2 g + (0 for s, 1 for t) of a q4_k or q5_k block.
uint8_t read_six_bits(const uint8_t* packed, int64_t i) {
  const int64_t g = i / 2, first = i % 2 * 4;  // t's are 4 bytes behind the s's
  if (g < 4) return byte(packed[g + first] & 63U);
  const uint32_t four = i % 2 == 0 ? packed[g + 4] & 15U : packed[g + 4] >> 4U;
  return byte(four | (packed[g - 4 + first] >> 6U) << 4U);
}

/// One row's codes of a group into the group's bytes (zeroed before).
void put_codes(int bits, int64_t r, const uint8_t* code, uint8_t* group) {
  if (bits == 8) {
    for (int64_t j = 0; j < 8; ++j) std::memcpy(group + 64 * j + 4 * r, code + 4 * j, 4);
    return;
  }
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t t = 0; t < 4; ++t) {
      group[64 * i + 4 * r + t] = byte((code[4 * i + t] & 15U) | (code[16 + 4 * i + t] & 15U) << 4U);
    }
  }
  uint8_t* high = group + 256 + 4 * r;
  for (int64_t k = 0; k < kPackGroup && bits > 4; ++k) {
    const int64_t j = k / 4, t = k % 4;
    const uint32_t top = code[k] >> 4U;
    if (bits == 5) {
      high[t] = byte(high[t] | top << j);
    } else {
      uint8_t& to = high[j / 4 * 64 + t];
      to = byte(to | top << (2 * (j % 4)));
    }
  }
}

/// The reverse.
void get_codes(int bits, int64_t r, const uint8_t* group, uint8_t* code) {
  for (int64_t k = 0; k < kPackGroup; ++k) {
    const int64_t j = k / 4, t = k % 4;
    if (bits == 8) {
      code[k] = group[64 * j + 4 * r + t];
      continue;
    }
    const uint8_t both = group[64 * (j % 4) + 4 * r + t];
    code[k] = byte(j < 4 ? both & 15U : both >> 4U);
    const uint8_t* high = group + 256 + 4 * r + t;
    if (bits == 5) code[k] = byte(code[k] | (*high >> j & 1U) << 4U);
    if (bits == 6) code[k] = byte(code[k] | (high[j / 4 * 64] >> (2 * (j % 4)) & 3U) << 4U);
  }
}

void put_six_bits(int64_t r, int64_t i, uint8_t value, uint8_t* packed) {
  if (i < 12) {
    uint8_t& to = packed[16 * i + r];
    to = byte(to | value);
    return;
  }
  for (int64_t part = 0; part < 3; ++part) {
    uint8_t& to = packed[16 * (4 * part + i - 12) + r];
    to = byte(to | (value >> (2 * part) & 3U) << 6U);
  }
}

uint8_t get_six_bits(int64_t r, int64_t i, const uint8_t* packed) {
  if (i < 12) return byte(packed[16 * i + r] & 63U);
  uint32_t value = 0;
  for (int64_t part = 0; part < 3; ++part)
    value |= (packed[16 * (4 * part + i - 12) + r] >> 6U) << (2 * part);
  return byte(value);
}

/// One row's scales of a block into those of the tile (zeroed before).
void put_scales(Packing p, int64_t r, const uint8_t* block, uint8_t* scales) {
  constexpr int64_t kHalves = 2 * kPackRows;
  if (p == Packing::mxfp4) {
    scales[r] = block[0];
    return;
  }
  if (p == Packing::q6_k) {
    std::memcpy(scales + 2 * r, block + 208, 2);
    for (int64_t i = 0; i < 2 * kSuperGroups; ++i) scales[kHalves + kPackRows * i + r] = block[192 + i];
    return;
  }
  std::memcpy(scales + 2 * r, block, 2);
  if (!has_minimum(p)) return;
  std::memcpy(scales + kHalves + 2 * r, block + 2, 2);
  if (!is_super(p)) return;
  for (int64_t i = 0; i < 2 * kSuperGroups; ++i) {
    put_six_bits(r, i, read_six_bits(block + 4, i), scales + 2 * kHalves);
  }
}

/// Where the codes of group g begin in a tile.
int64_t group_offset(Packing p, int64_t g) {
  const int64_t groups = inputs_at_once(p) / kPackGroup;
  return g / groups * record_bytes(p) + scale_bytes(p) + g % groups * group_code_bytes(p);
}

float read_half(const uint8_t* at) {
  f16_t half = 0;
  std::memcpy(&half, at, sizeof(half));
  return half_to_float(half);
}

/// Scale and minimum of 16 inputs, half `part` of group g.
struct Scale {
  float d;
  float m;
};
Scale get_scale(Packing p, int64_t r, int64_t g, int64_t part, const uint8_t* tile) {
  constexpr int64_t kHalves = 2 * kPackRows;
  const uint8_t* at = tile + g * kPackGroup / inputs_at_once(p) * record_bytes(p);
  if (p == Packing::mxfp4) return {std::bit_cast<float>(mxfp4_scale_bits(at[r])), 0};
  const float d = read_half(at + 2 * r);
  const int64_t in_super = g % kSuperGroups;
  if (p == Packing::q6_k) {
    const auto s = static_cast<int8_t>(at[kHalves + kPackRows * (2 * in_super + part) + r]);
    return {d * static_cast<float>(s), 0};
  }
  if (!has_minimum(p)) return {d, 0};
  const float m = read_half(at + kHalves + 2 * r);
  if (!is_super(p)) return {d, m};
  const uint8_t* six = at + 2 * kHalves;
  return {d * static_cast<float>(get_six_bits(r, 2 * in_super, six)),
          -(m * static_cast<float>(get_six_bits(r, 2 * in_super + 1, six)))};
}

}  // namespace

int64_t file_row_bytes(Packing p, int64_t n_in) { return n_in / inputs_at_once(p) * block_shape(p).bytes; }

void pack_tile(Packing p, int64_t n_in, const uint8_t* const* rows, uint8_t* tile) {
  std::memset(tile, 0, static_cast<size_t>(tile_bytes(p, n_in)));
  const int64_t block = block_shape(p).bytes;
  for (int64_t r = 0; r < kPackRows; ++r) {
    if (rows[r] == nullptr) continue;
    for (int64_t b = 0; b < n_in / inputs_at_once(p); ++b) {
      put_scales(p, r, rows[r] + b * block, tile + b * record_bytes(p));
    }
    for (int64_t g = 0; g < n_in / kPackGroup; ++g) {
      uint8_t code[kPackGroup] = {};
      read_codes(p, rows[r], g, code);
      put_codes(code_bits(p), r, code, tile + group_offset(p, g));
    }
  }
}

void unpack_row(const PackedMatrix& w, int64_t row, float* out) {
  const Packing p = w.packing;
  const uint8_t* tile = w.tiles + row / kPackRows * tile_bytes(p, w.n_in);
  const int64_t r = row % kPackRows;
  const int zero = zero_shift(p) == 0 ? 0 : 1 << zero_shift(p);
  for (int64_t g = 0; g < w.n_in / kPackGroup; ++g) {
    uint8_t code[kPackGroup] = {};
    get_codes(code_bits(p), r, tile + group_offset(p, g), code);
    for (int64_t k = 0; k < kPackGroup; ++k) {
      const Scale s = get_scale(p, r, g, k / 16, tile);
      // A product of so few bits is exact; only the minimum rounds.
      const int number = has_table(p) ? code_table(p)[code[k]] : code[k];
      const float x = s.d * static_cast<float>(number - zero);
      out[g * kPackGroup + k] = has_minimum(p) ? x + s.m : x;
    }
  }
}

}  // namespace narrows::kernels
