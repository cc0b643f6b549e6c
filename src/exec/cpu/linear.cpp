#include "exec/cpu/linear.h"

#include "kernels/ops.h"

namespace narrows {

using kernels::kPackGroup;
using kernels::kPackRows;

bool ByteInput::reserve(int64_t n_row, int64_t n_in) {
  const int64_t n = n_row * n_in, groups = n / kPackGroup;
  if (code_.size() >= n && code_.ok()) return true;
  code_ = AlignedArray<int8_t>(n);
  scale_ = AlignedArray<float>(groups);
  total_ = AlignedArray<float>(groups);
  minus_ = AlignedArray<int32_t>(groups);
  minus_half_ = AlignedArray<int32_t>(2 * groups);
  return code_.ok() && scale_.ok() && total_.ok() && minus_.ok() && minus_half_.ok();
}

kernels::ByteRows ByteInput::rows(int64_t first, int64_t n_in) {
  const int64_t g = first * (n_in / kPackGroup);
  return {code_.data() + first * n_in, scale_.data() + g, total_.data() + g, minus_.data() + g,
          minus_half_.data() + 2 * g};
}

void ByteInput::round(const float* x, int64_t ldx, int64_t n_in, int64_t first, int64_t end) {
  if (first < end) kernels::ops().round_rows(x + first * ldx, ldx, end - first, n_in, rows(first, n_in));
}

bool LinearInput::reserve(int64_t n_row, int64_t n_in) {
  const int64_t bytes = n_row * n_in * static_cast<int64_t>(sizeof(float));  // no form is wider
  if (dot_.size() < bytes || !dot_.ok()) dot_ = AlignedArray<char>(bytes);
  return rounded_.reserve(n_row, n_in) && dot_.ok();
}

void LinearInput::set(const float* x, int64_t ldx, int64_t n_row, int64_t n_in) {
  x_ = x;
  ldx_ = ldx;
  n_row_ = n_row;
  n_in_ = n_in;
  has_bytes_ = has_dot_ = false;
}

void LinearInput::set(const float* x, int64_t ldx, int64_t n_row, int64_t n_in,
                      const kernels::ByteRows& bytes) {
  set(x, ldx, n_row, n_in);
  bytes_ = bytes;
  has_bytes_ = true;
}

const kernels::ByteRows& LinearInput::bytes() {
  if (!has_bytes_) {
    rounded_.round(x_, ldx_, n_in_, 0, n_row_);
    bytes_ = rounded_.rows(0, n_in_);
  }
  has_bytes_ = true;
  return bytes_;
}

const char* LinearInput::for_dot(const DotProduct& dot, int64_t* bytes) {
  const TensorType type = dot.input_type();
  if (type == TensorType::f32) {
    *bytes = ldx_ * static_cast<int64_t>(sizeof(float));
    return reinterpret_cast<const char*>(x_);
  }
  *bytes = row_bytes(type, n_in_);
  if (!has_dot_ || dot_type_ != type) {
    for (int64_t r = 0; r < n_row_; ++r) dot.convert(x_ + r * ldx_, dot_.data() + r * *bytes, n_in_);
    dot_type_ = type;
    has_dot_ = true;
  }
  return dot_.data();
}

Linear Linear::rows(int64_t first, int64_t n) const {
  Linear part = *this;
  part.first_ += first;
  part.n_out_ = n;
  return part;
}

void Linear::multiply(int64_t first, int64_t end, LinearInput& x, float* y, int64_t ldy,
                      bool accumulate) const {
  if (first >= end) return;
  if (w_->tiles) {
    // Outputs of the whole matrix are counted from its own first row.
    const int64_t tile = (first_ + first) / kPackRows, end_tile = kernels::pack_tiles(first_ + end);
    kernels::ops().packed_product(*w_->tiles, tile, end_tile - tile, x.bytes(), x.n_row(), y - first_, ldy,
                                  accumulate);
    return;
  }
  const DotProduct dot(w_->type);
  const int64_t row = w_->row_bytes();
  const char* weights = w_->rows + first_ * row;
  int64_t input_bytes = 0;
  const char* inputs = x.for_dot(dot, &input_bytes);
  for (int64_t o = first; o < end; ++o) {
    for (int64_t r = 0; r < x.n_row(); ++r) {
      const float sum = dot(n_in(), weights + o * row, inputs + r * input_bytes);
      float& to = y[r * ldy + o];
      to = accumulate ? to + sum : sum;
    }
  }
}

}  // namespace narrows
