// The graph of one decode step of one or several sessions: embedding rows in, logits out, every layer's
// attention as custom ops that run the phases of each session's LayerDecoder. The weights are read once for
// all of them. Pipeline steps 3 and 6.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "decode/layer_decoder.h"
#include "model/graph.h"

namespace narrows {

/// One session's part of a step: its decoders, one a layer, and what they work in.
struct DecodeLane {
  std::span<const std::unique_ptr<LayerDecoder>> decoders;
  StepScratch* scratch = nullptr;
};

/// Most phases of any lane, layer by layer.
std::vector<int> phases_of(std::span<const DecodeLane> lanes);

class DecodeGraph {
 public:
  /// For n_lane sessions whose layers have at most n_phase [n_layer] phases. out_of_memory if the activations
  /// cannot be allocated.
  static Result<std::unique_ptr<DecodeGraph>> create(const ModelWeights& weights, int n_lane,
                                                     std::span<const int> n_phase);
  ~DecodeGraph();
  DecodeGraph(const DecodeGraph&) = delete;
  DecodeGraph& operator=(const DecodeGraph&) = delete;

  int n_lane() const { return static_cast<int>(lanes_.size()); }
  /// True if sessions with these phases [n_layer] can run in it.
  bool has_phases(std::span<const int> n_phase) const;

  /// Embedding row of a lane, to be filled before run(), [n_embd].
  float* input(int lane) const;
  /// Computes the step of n_lane() lanes, whose decoders have been prepared. A lane's numbers are the same to
  /// the last bit whatever the others are, and as many as they are.
  Status run(std::span<const DecodeLane> lanes, GraphRunner& runner);
  /// [n_vocab], of the last run.
  std::span<const float> logits(int lane) const;

  /// q, k, v (before RoPE) and attention output of one layer in the last run, for eval and tests.
  const DecodeStep& step(int64_t layer, int lane = 0) const;

 private:
  struct Op;
  DecodeGraph() = default;

  ggml_context* ctx_ = nullptr;
  ggml_backend_buffer_t buffer_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
  ggml_tensor* input_ = nullptr;
  ggml_tensor* logits_ = nullptr;
  std::vector<int> n_phase_;              ///< [n_layer]
  std::vector<DecodeLane> lanes_;         ///< [n_lane] of the running step
  std::vector<DecodeStep> steps_;         ///< [n_layer, n_lane]; sized once, ops point into it
  std::vector<std::unique_ptr<Op>> ops_;  ///< userdata of the custom ops
};

}  // namespace narrows
