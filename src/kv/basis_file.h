// Basis files: what `narrows calibrate` makes of a text, and caches of that model use instead of their
// prompt.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kv/basis.h"
#include "kv/klt/klt_basis.h"
#include "narrows/engine.h"
#include "narrows/status.h"

namespace narrows {

/// A basis file: GGUF, architecture "narrows-basis", version 2, the model's fingerprint and shapes, how it
/// was made (tokens, source). All tensors F32, shapes row-major, D = n_head_kv * head_dim, w = width of a
/// transform (heads_of_part() heads, D / w of them one after another):
///   SALS  blk.N.key_basis [D, D], blk.N.key_energy [D]
///   klt   blk.N.klt_X_mean [D], blk.N.klt_X_weight [D, head_dim], blk.N.klt_X_decode [D, w],
///         blk.N.klt_X_variance [D], X = key and value
struct BasisFile {
  std::string fingerprint;
  std::string made_from;  ///< free text: files and number of tokens
  int64_t n_tokens = 0;
  std::vector<LayerBasis> layers;
  std::vector<KltLayerBasis> klt;  ///< [n_layer]
};

/// Written aside and renamed. disk_full if there is no room.
Status write_basis_file(const std::string& path, const BasisFile& basis, const ModelInfo& model);

/// Treats the file as hostile. invalid_file if it is missing, cut off, not a basis, has a wrong shape or
/// non-finite numbers, or was made for another model (names both fingerprints).
Result<std::shared_ptr<const BasisFile>> read_basis_file(const std::string& path, const ModelInfo& model);

}  // namespace narrows
