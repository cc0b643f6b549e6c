// Tables of latent_page.h.
#include "kernels/latent_page.h"

namespace narrows::kernels {

namespace {

constexpr std::array<float, 256> amplitudes() {
  // 2^(i/8), to the nearest float; products with powers of two are exact, so every machine has the same
  // table.
  constexpr double kRoot[8] = {1.0,
                               1.0905077326652577,
                               1.189207115002721,
                               1.2968395546510096,
                               1.4142135623730951,
                               1.5422108254079407,
                               1.681792830507429,
                               1.8340080864093424};
  std::array<float, 256> table = {};
  for (int s = 0; s < 256; ++s) {
    double x = kRoot[s % 8];
    for (int i = s / 8; i < kScaleBias / 8; ++i) x /= 2;
    for (int i = kScaleBias / 8; i < s / 8; ++i) x *= 2;
    table[static_cast<size_t>(s)] = static_cast<float>(x);
  }
  return table;
}

}  // namespace

constinit const std::array<float, 256> kAmplitude = amplitudes();

PlaneRow make_plane_row(const uint8_t* octet_bits, int64_t n_octet) {
  PlaneRow row;
  for (int j = 0; j < kMaxBits; ++j) {
    int32_t covered = 0;
    while (covered < n_octet && octet_bits[covered] > j) ++covered;
    if (covered == 0) break;
    const auto at = static_cast<size_t>(j);
    row.octets[at] = covered;
    row.offset[at] = row.bytes;
    row.bytes += covered;
    ++row.n_plane;
  }
  row.n_octet = row.octets[0];
  return row;
}

}  // namespace narrows::kernels
