// The graph of one decode step: embedding in, logits out, every layer's attention as custom ops that run the
// phases of a LayerDecoder. Built once a session. Pipeline steps 3 and 6.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "decode/layer_decoder.h"
#include "model/graph.h"

namespace narrows {

class DecodeGraph {
 public:
  /// decoders: one a layer, outlive the graph. out_of_memory if the activations cannot be allocated.
  static Result<std::unique_ptr<DecodeGraph>> create(const ModelWeights& weights,
                                                     std::span<const std::unique_ptr<LayerDecoder>> decoders,
                                                     StepScratch* scratch);
  ~DecodeGraph();
  DecodeGraph(const DecodeGraph&) = delete;
  DecodeGraph& operator=(const DecodeGraph&) = delete;

  /// Embedding row to be filled before run(), [n_embd].
  float* input() const;
  /// Computes the step; the decoders have been prepared.
  Status run(GraphRunner& runner);
  /// [n_vocab], of the last run.
  std::span<const float> logits() const;

  /// q, k, v (before RoPE) and attention output of one layer in the last run, for eval and tests.
  const DecodeStep& step(int64_t layer) const;

 private:
  struct Op;
  DecodeGraph() = default;

  ggml_context* ctx_ = nullptr;
  ggml_backend_buffer_t buffer_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
  ggml_tensor* input_ = nullptr;
  ggml_tensor* logits_ = nullptr;
  std::vector<DecodeStep> steps_;         ///< [n_layer]; sized once, ops point into it
  std::vector<std::unique_ptr<Op>> ops_;  ///< userdata of the custom ops
};

}  // namespace narrows
