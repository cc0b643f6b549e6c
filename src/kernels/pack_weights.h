// From the blocks of a GGUF file to the tiles of packed_weights.h and back to numbers; once a model is
// loaded, and in tests. Without loss in both directions.
#pragma once

#include <cstdint>

#include "kernels/packed_weights.h"

namespace narrows::kernels {

/// Bytes of n_in weights of a row in the file.
int64_t file_row_bytes(Packing p, int64_t n_in);

/// One tile from rows in the file's blocks: rows [kPackRows], file_row_bytes() each, null for a row of zeros.
/// tile: tile_bytes(), every byte written. n_in is a multiple of inputs_at_once().
void pack_tile(Packing p, int64_t n_in, const uint8_t* const* rows, uint8_t* tile);

/// One row as numbers, out [n_in]: the floats that ggml unpacks the file's row to.
void unpack_row(const PackedMatrix& w, int64_t row, float* out);

}  // namespace narrows::kernels
