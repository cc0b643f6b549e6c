// A weight matrix as a decode step multiplies by it, row by row of its outputs: out of packed tiles, or out
// of the file's rows by ggml's dot products for types that have no packing. Threads share the rows as they
// like; a result depends on nothing but the weights and its own row of inputs.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "ggml.h"
#include "kernels/packed_weights.h"
#include "model/weights.h"

namespace narrows {

/// Rows of inputs of one thread, in the forms that products take; each is made when it is first asked for.
class LinearInput {
 public:
  /// Room for n_row rows of n_in. False if there is no memory.
  bool reserve(int64_t n_row, int64_t n_in);
  /// x [n_row, ldx], valid until the next set(); sizes within those reserved.
  void set(const float* x, int64_t ldx, int64_t n_row, int64_t n_in);

  int64_t n_row() const { return n_row_; }
  int64_t n_in() const { return n_in_; }
  /// Rounded to bytes. n_in is a multiple of 32.
  const kernels::ByteRows& bytes();
  /// As ggml's dot product with weights of this type takes them, [n_row] rows of *row_bytes.
  const char* for_dot(ggml_type weight_type, int64_t* row_bytes);

 private:
  const float* x_ = nullptr;
  int64_t ldx_ = 0, n_row_ = 0, n_in_ = 0;
  bool has_bytes_ = false;
  ggml_type dot_type_ = GGML_TYPE_COUNT;  ///< of what is in dot_
  AlignedArray<int8_t> code_;
  AlignedArray<float> scale_, total_;
  AlignedArray<int32_t> minus_, minus_half_;
  kernels::ByteRows bytes_{};
  AlignedArray<char> dot_;
};

class Linear {
 public:
  Linear() = default;  ///< of nothing
  /// `weight` is one of the model's matrices, or null.
  Linear(const ModelWeights& weights, const ggml_tensor* weight);

  explicit operator bool() const { return weight_ != nullptr; }
  int64_t n_in() const { return weight_->ne[0]; }
  int64_t n_out() const { return n_out_; }
  /// Rows [first, first + n) alone; first is a multiple of unit().
  Linear rows(int64_t first, int64_t n) const;
  /// Rows that are computed together: a part begins at a multiple of this.
  int64_t unit() const { return packed_ ? kernels::kPackRows : 1; }
  int64_t row_bytes() const;

  /// y [x.n_row(), ldy] (+)= outputs [first, end): y[r * ldy + o] is output o of input row r. first is a
  /// multiple of unit(), end too or n_out(). Thread-safe but for x.
  void multiply(int64_t first, int64_t end, LinearInput& x, float* y, int64_t ldy, bool accumulate) const;

 private:
  const ggml_tensor* weight_ = nullptr;
  const kernels::PackedMatrix* packed_ = nullptr;
  int64_t first_ = 0;  ///< row of the weight that is output 0
  int64_t n_out_ = 0;
};

}  // namespace narrows
