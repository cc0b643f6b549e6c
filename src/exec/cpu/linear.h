// A weight matrix as rows of inputs are multiplied by it, output by output: out of packed tiles, or by ggml's
// dot products for types that have no tiles. Threads share the outputs as they like; a result depends on
// nothing but the weights and its own row of inputs.
#pragma once

#include <cstdint>

#include "base/aligned.h"
#include "kernels/packed_weights.h"
#include "model/matrix.h"

namespace narrows {

/// Rows of inputs rounded to bytes, of one thread or shared by all.
class ByteInput {
 public:
  /// Room for n_row rows of n_in. False if there is no memory.
  bool reserve(int64_t n_row, int64_t n_in);
  /// Rounds rows [first, end) of x [.., ldx]; n_in is a multiple of 32.
  void round(const float* x, int64_t ldx, int64_t n_in, int64_t first, int64_t end);
  /// From row `first` on, as rounded with this n_in.
  kernels::ByteRows rows(int64_t first, int64_t n_in);

 private:
  AlignedArray<int8_t> code_;
  AlignedArray<float> scale_, total_;
  AlignedArray<int32_t> minus_, minus_half_;
};

/// Rows of inputs of one thread, in the forms that products take; each is made when it is first asked for.
class LinearInput {
 public:
  bool reserve(int64_t n_row, int64_t n_in);
  /// x [n_row, ldx], valid until the next set(); sizes within those reserved.
  void set(const float* x, int64_t ldx, int64_t n_row, int64_t n_in);
  /// The same where the rows have been rounded already.
  void set(const float* x, int64_t ldx, int64_t n_row, int64_t n_in, const kernels::ByteRows& bytes);

  int64_t n_row() const { return n_row_; }
  int64_t n_in() const { return n_in_; }
  const kernels::ByteRows& bytes();
  /// As this dot product takes them, [n_row] rows of *bytes.
  const char* for_dot(const DotProduct& dot, int64_t* bytes);

 private:
  const float* x_ = nullptr;
  int64_t ldx_ = 0, n_row_ = 0, n_in_ = 0;
  bool has_bytes_ = false;
  bool has_dot_ = false;
  TensorType dot_type_ = TensorType::f32;  ///< of what is in dot_
  ByteInput rounded_;
  kernels::ByteRows bytes_{};
  AlignedArray<char> dot_;
};

class Linear {
 public:
  Linear() = default;  ///< of nothing
  /// w outlives it.
  explicit Linear(const Matrix& w) : w_(&w), n_out_(w.n_out) {}

  explicit operator bool() const { return w_ != nullptr; }
  int64_t n_in() const { return w_->n_in; }
  int64_t n_out() const { return n_out_; }
  bool takes_bytes() const { return w_->tiles.has_value(); }
  /// Rows [first, first + n) alone; first is a multiple of unit().
  Linear rows(int64_t first, int64_t n) const;
  /// Rows that are computed together: a part begins at a multiple of this.
  int64_t unit() const { return w_->tiles ? kernels::kPackRows : 1; }
  int64_t row_bytes() const { return w_->row_bytes(); }

  /// y [x.n_row(), ldy] (+)= outputs [first, end): y[r * ldy + o] is output o of input row r. first is a
  /// multiple of unit(), end too or n_out(). Thread-safe but for x.
  void multiply(int64_t first, int64_t end, LinearInput& x, float* y, int64_t ldy, bool accumulate) const;

 private:
  const Matrix* w_ = nullptr;
  int64_t first_ = 0;  ///< row of the weight that is output 0
  int64_t n_out_ = 0;
};

}  // namespace narrows
