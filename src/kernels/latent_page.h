// Pages of latent coordinates as bit planes: shapes and the amplitude scale that the latent kernels of ops.h
// and the cache's layout share.
//
// A coordinate of b bits is a mid-rise uniform quantiser of 2^b levels between -2A and 2A: its code's bits,
// most significant first, each add +A, A/2, A/4, .. (bit set) or subtract it. Planes of the same significance
// of all coordinates lie together, and coordinates are sorted by falling bits, so plane j covers a prefix of
// them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace narrows::kernels {

/// Coordinates get their bits in octets: a plane is then whole bytes.
inline constexpr int64_t kOctet = 8;
inline constexpr int kMaxBits = 8;

/// Of a coordinate's bits, those that scoring looks at: codes of 6 bits times int8 add up in pairs without
/// leaving int16, which is what CPUs without VNNI offer.
inline constexpr int kScoreBits = 6;

/// Rows of latent numbers are padded to this many, so that kernels need no masks.
inline constexpr int64_t kLatentPad = 16;
inline constexpr int64_t pad_latent(int64_t n) { return (n + kLatentPad - 1) / kLatentPad * kLatentPad; }

/// Amplitude A of scale byte s: 2^((s - 128) / 8).
inline constexpr int kScaleBias = 128;
extern const std::array<float, 256> kAmplitude;

/// Amplitudes that quantising tries, in eighths of an octave from half the largest number on: the first clips
/// nothing, the others trade clipping of outliers for finer steps.
inline constexpr std::array<int, 5> kScaleSteps = {1, -2, -5, -8, -11};

/// One token's row of planes: plane j is octets[j] bytes at offset[j]; bit i of byte o is coordinate 8 o + i.
struct PlaneRow {
  int32_t n_plane = 0;
  int32_t n_octet = 0;  ///< octets[0], or 0
  int32_t bytes = 0;
  std::array<int32_t, kMaxBits> octets = {};
  std::array<int32_t, kMaxBits> offset = {};
};

/// octet_bits [n_octet], falling, each 0 to 8.
PlaneRow make_plane_row(const uint8_t* octet_bits, int64_t n_octet);

/// Where a token's code stands in the 64-bit planes of the index part. Chosen so that interleaving four
/// coordinates in registers of any width leaves the tokens in order.
inline constexpr int64_t index_slot(int64_t token) {
  return (token >> 2 & 3) * 16 + (token >> 4) * 4 + (token & 3);
}

}  // namespace narrows::kernels
