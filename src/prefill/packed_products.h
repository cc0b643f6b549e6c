// Products of a prompt's rows with packed weights, by the kernel of a decode step: activations rounded to
// bytes. For prompts that are too short for unpacked weights (bf16_products.h), for logits, and where the CPU
// has no bf16.
#pragma once

#include <memory>
#include <vector>

#include "base/aligned.h"
#include "kernels/packed_weights.h"
#include "model/graph.h"
#include "model/weights.h"

namespace narrows {

class PackedProducts final : public Products {
 public:
  /// weights outlive it.
  explicit PackedProducts(const ModelWeights& weights);
  ~PackedProducts() override;

  /// Before each graph: what earlier graphs used is free again.
  void begin();
  /// False if there was no memory for the graph that has been built: it must not run.
  bool ok() const { return ok_; }
  /// Peak bytes of a graph of one layer over n rows.
  static int64_t bytes_needed(const ModelWeights& weights, int64_t n);

  /// Two custom ops, the rounding of x and the product, for packed weights; ggml's product for others. x's
  /// rows lie one after the other.
  ggml_tensor* multiply(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x) override;

 private:
  struct Rounded;
  struct Product;
  Rounded* rounded(ggml_context* ctx, ggml_tensor* x);

  const ModelWeights& weights_;
  std::vector<std::unique_ptr<Rounded>> rounded_;  ///< the first n_rounded_ are the running graph's
  size_t n_rounded_ = 0;
  std::vector<std::unique_ptr<Product>> products_;
  bool ok_ = true;
};

}  // namespace narrows
