// The products of a prompt in bfloat16 with float32 sums, by oneDNN: a layer's weights are unpacked from the
// file once a prompt, into the layout that the product likes, and multiply every chunk of it. Where the
// products of a step round activations to 8 bits in groups, here both factors keep 8 significant bits.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned.h"
#include "model/graph.h"
#include "model/weights.h"
#include "narrows/status.h"

namespace narrows {

class Bf16Products final : public Products {
 public:
  /// True if this CPU multiplies bfloat16 (AVX512-BF16).
  static bool supported();
  /// True if a weight of this model would be multiplied in bfloat16: those stored as float32 stay with ggml.
  static bool applies(const ModelWeights& weights);
  /// Peak bytes: one layer's weights in bfloat16, its largest one twice, activations of a block of rows.
  static int64_t bytes_needed(const ModelWeights& weights, int n_threads);

  /// All outlive it; otherwise: for weights that are not of the loaded layer. internal: oneDNN does not
  /// start.
  static Result<std::unique_ptr<Bf16Products>> create(const ModelWeights& weights, GraphRunner& runner,
                                                      Products& otherwise);
  ~Bf16Products() override;

  /// Unpacks a layer's weights. io_error: the file is gone; out_of_memory.
  Status load(int64_t layer);

  /// For weights of the loaded layer a custom op, else the other products. Tensors are valid until the next
  /// load().
  ggml_tensor* multiply(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x) override;

  /// What went wrong since it was asked last: a product that could not be prepared (ask before a graph is
  /// run), or computed (ask after it). out_of_memory, or internal if oneDNN failed.
  Status status() const;

 private:
  struct Impl;
  explicit Bf16Products(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace narrows
