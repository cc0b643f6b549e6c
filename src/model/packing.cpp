#include "model/packing.h"

namespace narrows {

namespace {

std::optional<kernels::Packing> packing_of(ggml_type type) {
  switch (type) {
    case GGML_TYPE_Q4_0:
      return kernels::Packing::q4_0;
    case GGML_TYPE_Q4_1:
      return kernels::Packing::q4_1;
    case GGML_TYPE_Q5_0:
      return kernels::Packing::q5_0;
    case GGML_TYPE_Q5_1:
      return kernels::Packing::q5_1;
    case GGML_TYPE_Q8_0:
      return kernels::Packing::q8_0;
    case GGML_TYPE_Q4_K:
      return kernels::Packing::q4_k;
    case GGML_TYPE_Q5_K:
      return kernels::Packing::q5_k;
    case GGML_TYPE_Q6_K:
      return kernels::Packing::q6_k;
    default:
      return std::nullopt;
  }
}

}  // namespace

std::optional<kernels::Packing> packing_of(ggml_type type, int64_t n_in) {
  const std::optional<kernels::Packing> packing = packing_of(type);
  if (!packing || n_in % kernels::inputs_at_once(*packing) != 0) return std::nullopt;
  return packing;
}

}  // namespace narrows
