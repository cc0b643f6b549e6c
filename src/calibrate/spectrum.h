// How the key spectrum falls by layer, for `inspect`.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "narrows/engine.h"

namespace narrows {

/// Shares of the (centred) key variance in the leading coordinates of a joint PCA over the KV heads; D =
/// width.
struct LayerSpectrum {
  int64_t layer = 0;
  double share_8th = 0;  ///< in the first D / 8 coordinates
  double share_4th = 0;
  double share_half = 0;
  double mean_over_sd = 0;  ///< length of the mean key over the square root of the total variance
};

Result<std::vector<LayerSpectrum>> key_spectrum(const Model& model, std::span<const Token> text,
                                                int n_threads = 0, const ProgressFn& progress = {});

}  // namespace narrows
