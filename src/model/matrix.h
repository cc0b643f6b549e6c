// A weight matrix where a CPU multiplies by it: in the tiles of kernels/packed_weights.h, or in the file's
// rows for types that have no tiles. Memory belongs to ModelWeights.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "gguf/tensor_type.h"
#include "kernels/packed_weights.h"

namespace narrows {

struct Matrix {
  std::string name;  ///< of the file's (first) tensor; an expert's with its number
  TensorType type = TensorType::f32;
  int64_t n_in = 0;
  int64_t n_out = 0;  ///< 0: there is no such matrix
  std::optional<kernels::PackedMatrix> tiles;
  const char* rows = nullptr;  ///< [n_out] of row_bytes(), if there are no tiles

  explicit operator bool() const { return n_out > 0; }
  /// In the file, and in memory but for the last tile.
  int64_t row_bytes() const { return narrows::row_bytes(type, n_in); }
  /// Rows [first, first + n) as numbers, out [n, n_in]: those that the file's say.
  void unpack(int64_t first, int64_t n, float* out) const;
};

/// The tiles for a type; nullopt if it has none, or a row length that does not fit them.
std::optional<kernels::Packing> packing_of(TensorType type, int64_t n_in);

}  // namespace narrows
