// Layout of select_top's scratch, the same for every target: histograms, n keys, n candidates.
#pragma once

#include <cstdint>

namespace narrows::kernels {

/// Bits of a key that one pass settles, 11 of 32: three passes, and both histograms (16 KB) fit L1 beside the
/// keys that stream by.
inline constexpr int kSelectBits = 11;
inline constexpr int64_t kSelectBins = int64_t{1} << kSelectBits;
inline constexpr int64_t kSelectTables = 2;

/// Keys that are compared together, a bit each; reads go to the next multiple of it.
inline constexpr int64_t kSelectWord = 64;
inline constexpr int64_t select_padded(int64_t n) {
  return (n + kSelectWord - 1) / kSelectWord * kSelectWord;
}

}  // namespace narrows::kernels
