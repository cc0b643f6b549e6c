// Element types of GGUF's tensors by their number, and what ggml computes with them: names, sizes, numbers,
// and dot products for types that have no kernel of ours. Outside this folder nobody needs ggml's header for
// it.
#pragma once

#include <cstdint>

namespace narrows {

/// GGUF's number of a type (GGML_TYPE_.. has the same).
enum class TensorType : int32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  iq4_nl = 20,
  bf16 = 30,
  mxfp4 = 39
};

/// Of a known type, "q4_K" say.
const char* type_name(TensorType type);
/// Bytes of n elements of a row; n is a multiple of the type's block.
int64_t row_bytes(TensorType type, int64_t n);
/// True if to_float() and DotProduct work.
bool can_compute(TensorType type);
/// n elements as numbers.
void to_float(TensorType type, const void* from, float* to, int64_t n);
/// Rounds to nearest even.
void to_bf16(const float* from, uint16_t* to, int64_t n);

/// ggml's dot product of a row of weights with a row of inputs in the form that it wants.
class DotProduct {
 public:
  explicit DotProduct(TensorType weight);
  TensorType input_type() const { return input_; }
  /// Rows of inputs in that form; float32 is float32 already.
  void convert(const float* from, void* to, int64_t n) const;
  float operator()(int64_t n, const void* weight, const void* input) const;

 private:
  const void* weight_traits_;
  TensorType input_;
};

}  // namespace narrows
