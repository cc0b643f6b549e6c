#include "model/matrix.h"

#include "kernels/pack_weights.h"

namespace narrows {

namespace {

std::optional<kernels::Packing> packing_of(TensorType type) {
  switch (type) {
    case TensorType::q4_0:
      return kernels::Packing::q4_0;
    case TensorType::q4_1:
      return kernels::Packing::q4_1;
    case TensorType::q5_0:
      return kernels::Packing::q5_0;
    case TensorType::q5_1:
      return kernels::Packing::q5_1;
    case TensorType::q8_0:
      return kernels::Packing::q8_0;
    case TensorType::q4_k:
      return kernels::Packing::q4_k;
    case TensorType::q5_k:
      return kernels::Packing::q5_k;
    case TensorType::q6_k:
      return kernels::Packing::q6_k;
    case TensorType::iq4_nl:
      return kernels::Packing::iq4_nl;
    case TensorType::mxfp4:
      return kernels::Packing::mxfp4;
    default:
      return std::nullopt;
  }
}

}  // namespace

std::optional<kernels::Packing> packing_of(TensorType type, int64_t n_in) {
  const std::optional<kernels::Packing> packing = packing_of(type);
  if (!packing || n_in % kernels::inputs_at_once(*packing) != 0) return std::nullopt;
  return packing;
}

void Matrix::unpack(int64_t first, int64_t n, float* out) const {
  if (!tiles) return to_float(type, rows + first * row_bytes(), out, n * n_in);
  for (int64_t r = 0; r < n; ++r) kernels::unpack_row(*tiles, first + r, out + r * n_in);
}

}  // namespace narrows
