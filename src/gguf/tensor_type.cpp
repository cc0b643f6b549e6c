#include "gguf/tensor_type.h"

#include <cstring>

#include "ggml-cpu.h"
#include "ggml.h"

namespace narrows {

namespace {

ggml_type of(TensorType type) { return static_cast<ggml_type>(type); }

static_assert(static_cast<int>(TensorType::f32) == GGML_TYPE_F32 &&
              static_cast<int>(TensorType::f16) == GGML_TYPE_F16);
static_assert(static_cast<int>(TensorType::q4_0) == GGML_TYPE_Q4_0 &&
              static_cast<int>(TensorType::q4_1) == GGML_TYPE_Q4_1);
static_assert(static_cast<int>(TensorType::q5_0) == GGML_TYPE_Q5_0 &&
              static_cast<int>(TensorType::q5_1) == GGML_TYPE_Q5_1);
static_assert(static_cast<int>(TensorType::q8_0) == GGML_TYPE_Q8_0 &&
              static_cast<int>(TensorType::q4_k) == GGML_TYPE_Q4_K);
static_assert(static_cast<int>(TensorType::q5_k) == GGML_TYPE_Q5_K &&
              static_cast<int>(TensorType::q6_k) == GGML_TYPE_Q6_K);
static_assert(static_cast<int>(TensorType::bf16) == GGML_TYPE_BF16 &&
              static_cast<int>(TensorType::iq4_nl) == GGML_TYPE_IQ4_NL &&
              static_cast<int>(TensorType::mxfp4) == GGML_TYPE_MXFP4);

}  // namespace

const char* type_name(TensorType type) { return ggml_type_name(of(type)); }

int64_t row_bytes(TensorType type, int64_t n) { return static_cast<int64_t>(ggml_row_size(of(type), n)); }

bool can_compute(TensorType type) {
  static const bool ready = [] {
    ggml_cpu_init();  // tables that its dot products read
    return true;
  }();
  if (type == TensorType::f32) return true;
  return ready && of(type) >= 0 && of(type) < GGML_TYPE_COUNT &&
         ggml_get_type_traits(of(type))->to_float != nullptr &&
         ggml_get_type_traits_cpu(of(type))->vec_dot != nullptr;
}

void to_float(TensorType type, const void* from, float* to, int64_t n) {
  if (type == TensorType::f32) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else {
    ggml_get_type_traits(of(type))->to_float(from, to, n);
  }
}

void to_bf16(const float* from, uint16_t* to, int64_t n) {
  static_assert(sizeof(ggml_bf16_t) == sizeof(uint16_t));
  ggml_cpu_fp32_to_bf16(from, reinterpret_cast<ggml_bf16_t*>(to), n);
}

DotProduct::DotProduct(TensorType weight)
    : weight_traits_(ggml_get_type_traits_cpu(of(weight))),
      input_(static_cast<TensorType>(ggml_get_type_traits_cpu(of(weight))->vec_dot_type)) {}

void DotProduct::convert(const float* from, void* to, int64_t n) const {
  if (input_ == TensorType::f32) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else {
    ggml_get_type_traits_cpu(of(input_))->from_float(from, to, n);
  }
}

float DotProduct::operator()(int64_t n, const void* weight, const void* input) const {
  float sum = 0;
  static_cast<const ggml_type_traits_cpu*>(weight_traits_)
      ->vec_dot(static_cast<int>(n), &sum, 0, weight, 0, input, 0, 1);
  return sum;
}

}  // namespace narrows
