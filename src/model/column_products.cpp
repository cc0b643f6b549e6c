#include "model/column_products.h"

#include <algorithm>

namespace narrows {

namespace {

// ggml/src/ggml-cpu: repack.cpp multiplies four columns at a time by another kernel than one; tiled.cpp takes
// K-quants from eight columns on; llamafile/sgemm.cpp takes the types that it knows from two on: Q4_0, Q5_0
// and Q8_0 in the order of a single column, IQ4_NL and floats in another.
constexpr int64_t kRepacked = 3;
constexpr int64_t kQuantised = 7;

}  // namespace

int64_t ColumnProducts::columns_at_once(const ggml_tensor* weight) {
  const bool plain = weight->buffer == nullptr ||
                     ggml_backend_buffer_get_type(weight->buffer) == ggml_backend_cpu_buffer_type();
  if (!plain) return kRepacked;
  return ggml_is_quantized(weight->type) && weight->type != GGML_TYPE_IQ4_NL ? kQuantised : 1;
}

ggml_tensor* ColumnProducts::multiply(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x) {
  const int64_t n = x->ne[1], at_once = columns_at_once(weight);
  if (n <= at_once) return ggml_mul_mat(ctx, weight, x);
  ggml_tensor* y = nullptr;
  for (int64_t first = 0; first < n; first += at_once) {
    ggml_tensor* part = ggml_view_2d(ctx, x, x->ne[0], std::min(at_once, n - first), x->nb[1],
                                     static_cast<size_t>(first) * x->nb[1]);
    ggml_tensor* product = ggml_mul_mat(ctx, weight, part);
    y = y == nullptr ? product : ggml_concat(ctx, y, product, 1);
  }
  return y;
}

}  // namespace narrows
