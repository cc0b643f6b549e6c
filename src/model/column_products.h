// ggml's products of a few columns, such that each column has the bits that it has alone. ggml changes its
// kernel, and with it the order of sums, at certain numbers of columns; here a product never has more of them
// than its type's one-column order allows, and is otherwise cut. Measured in docs/experiments.md.
#pragma once

#include "model/graph.h"

namespace narrows {

class ColumnProducts final : public Products {
 public:
  /// Most columns of x that one product with this weight may take.
  static int64_t columns_at_once(const ggml_tensor* weight);
  /// Tensors that a product of n columns makes beyond the first, at most.
  static size_t more_tensors(int64_t n) { return n > 1 ? static_cast<size_t>(3 * n) : 0; }

  ggml_tensor* multiply(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x) override;
};

}  // namespace narrows
