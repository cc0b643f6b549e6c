#include "model/linear.h"

#include <algorithm>

#include "ggml-cpu.h"
#include "kernels/ops.h"

namespace narrows {

using kernels::kPackGroup;
using kernels::kPackRows;

bool LinearInput::reserve(int64_t n_row, int64_t n_in) {
  const int64_t n = n_row * n_in, groups = n_row * (n_in / kPackGroup);
  code_ = AlignedArray<int8_t>(n);
  scale_ = AlignedArray<float>(groups);
  total_ = AlignedArray<float>(groups);
  minus_ = AlignedArray<int32_t>(groups);
  minus_half_ = AlignedArray<int32_t>(2 * groups);
  dot_ = AlignedArray<char>(n * static_cast<int64_t>(sizeof(float)));  // no form is wider
  bytes_ = {code_.data(), scale_.data(), total_.data(), minus_.data(), minus_half_.data()};
  return code_.ok() && scale_.ok() && total_.ok() && minus_.ok() && minus_half_.ok() && dot_.ok();
}

void LinearInput::set(const float* x, int64_t ldx, int64_t n_row, int64_t n_in) {
  x_ = x;
  ldx_ = ldx;
  n_row_ = n_row;
  n_in_ = n_in;
  has_bytes_ = false;
  dot_type_ = GGML_TYPE_COUNT;
}

const kernels::ByteRows& LinearInput::bytes() {
  if (!has_bytes_) kernels::ops().round_rows(x_, ldx_, n_row_, n_in_, bytes_);
  has_bytes_ = true;
  return bytes_;
}

const char* LinearInput::for_dot(ggml_type weight_type, int64_t* row_bytes) {
  const ggml_type type = ggml_get_type_traits_cpu(weight_type)->vec_dot_type;
  if (type == GGML_TYPE_F32) {
    *row_bytes = ldx_ * static_cast<int64_t>(sizeof(float));
    return reinterpret_cast<const char*>(x_);
  }
  *row_bytes = static_cast<int64_t>(ggml_row_size(type, n_in_));
  if (dot_type_ != type) {
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(type)->from_float;
    for (int64_t r = 0; r < n_row_; ++r) from_float(x_ + r * ldx_, dot_.data() + r * *row_bytes, n_in_);
    dot_type_ = type;
  }
  return dot_.data();
}

Linear::Linear(const ModelWeights& weights, const ggml_tensor* weight) : weight_(weight) {
  if (weight == nullptr) return;
  packed_ = weights.packed(weight);
  n_out_ = weight->ne[1];
}

Linear Linear::rows(int64_t first, int64_t n) const {
  Linear part = *this;
  part.first_ += first;
  part.n_out_ = n;
  return part;
}

int64_t Linear::row_bytes() const {
  return static_cast<int64_t>(ggml_row_size(weight_->type, weight_->ne[0]));
}

void Linear::multiply(int64_t first, int64_t end, LinearInput& x, float* y, int64_t ldy,
                      bool accumulate) const {
  if (first >= end) return;
  if (packed_ != nullptr) {
    // Outputs of the whole matrix are counted from its own first row.
    const int64_t tile = (first_ + first) / kPackRows, end_tile = kernels::pack_tiles(first_ + end);
    kernels::ops().packed_product(*packed_, tile, end_tile - tile, x.bytes(), x.n_row(), y - first_, ldy,
                                  accumulate);
    return;
  }
  const ggml_vec_dot_t dot = ggml_get_type_traits_cpu(weight_->type)->vec_dot;
  const auto* rows = static_cast<const char*>(weight_->data) + first_ * static_cast<int64_t>(weight_->nb[1]);
  int64_t row_bytes = 0;
  const char* inputs = x.for_dot(weight_->type, &row_bytes);
  for (int64_t o = first; o < end; ++o) {
    for (int64_t r = 0; r < x.n_row(); ++r) {
      float sum = 0;
      dot(static_cast<int>(n_in()), &sum, 0, rows + o * static_cast<int64_t>(weight_->nb[1]), 0,
          inputs + r * row_bytes, 0, 1);
      float& to = y[r * ldy + o];
      to = accumulate ? to + sum : sum;
    }
  }
}

}  // namespace narrows
