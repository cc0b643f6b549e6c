// Which weights of a file go into the packed tiles of kernels/packed_weights.h.
#pragma once

#include <optional>

#include "ggml.h"
#include "kernels/packed_weights.h"

namespace narrows {

/// nullopt for a type that has no packing, or a row length that does not fit it.
std::optional<kernels::Packing> packing_of(ggml_type type, int64_t n_in);

}  // namespace narrows
