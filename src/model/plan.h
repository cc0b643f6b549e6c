// What a layer does with rows of the residual stream x, as data: the only place that says it, for prompts and
// steps and for every executor. A layer is five stages,
//
//   project   q, k, v = W norm(x) + b
//   mix       attention over the cache, q and k normed and rotated before; what it gives, times sigmoid of a
//             gate where the layer has such, is `out`'s input. Or gated DeltaNet (kernels/delta_net.h), whose
//             state is the layer's cache
//   out       x += norm(W mixed + b), or without a norm
//   ffn       act = activation(gate) * up of W norm(x) + b
//   down      x += norm(W act + b), or without a norm
//
// (what is added may be scaled), of which the last two are, where a layer has experts,
//
//   ffn       act_e = weight_e * activation(gate_e) * up_e of norm(x), for the experts e that softmax(W
//   norm(x))
//             chooses
//   down      x += sum of W_e act_e
//
// before the second of which the first two are done too, for an expert that all rows go through.
//
// and the logits are W norm(x) + b. An executor (exec/executor.h) maps a stage to whatever its device does
// best.
#pragma once

#include <cstdint>
#include <vector>

#include "model/spec.h"
#include "model/weights.h"

namespace narrows {

/// x / rms(x) * weight [n_embd].
struct NormOp {
  const float* weight = nullptr;  ///< null: x as it is
  float eps = 0;
};

/// y [n_out] = w x + bias.
struct LinearOp {
  const Matrix* w = nullptr;
  const float* bias = nullptr;  ///< [n_out] or null
};

/// W norm(x) for one matrix or several, whose outputs stand one after another in a row.
struct ProjectStage {
  NormOp norm;
  std::vector<LinearOp> linears;
  int64_t n_out = 0;  ///< of all of them
};

/// Norms of a row's q or k before RoPE: n runs of `width` coordinates, each for itself.
struct HeadNorms {
  NormOp norm;
  int64_t n = 0;
  int64_t width = 0;
};

struct MixStage {
  AttentionSpec attention;
  HeadNorms q_norm, k_norm;
  const float* sinks = nullptr;  ///< [n_head] or null: scores of the softmax that belong to no token
  kernels::DeltaNet delta_net;   ///< in the place of all of that where it has heads

  bool is_recurrent() const { return static_cast<bool>(delta_net.shape); }
  /// Numbers a row that it gives.
  int64_t width_out() const { return is_recurrent() ? delta_net.shape.width_v() : attention.width_q(); }
  /// Where the gates of a projected row begin.
  int64_t at_gate() const { return attention.width_q() + 2 * attention.width_kv(); }
};

struct ExpertOp {
  std::vector<LinearOp> gate_up;     ///< one matrix of both or two, without biases: those are
  const float* gate_bias = nullptr;  ///< [n_ff] or null
  const float* up_bias = nullptr;    ///< [n_ff] or null
  LinearOp down;
};

/// In place of a layer's ffn.linears and down, or beside them: those are the expert that all rows go through.
struct ExpertsStage {
  ExpertSpec spec;
  LinearOp router;
  int64_t n_ff = 0;                    ///< of an expert
  const float* shared_gate = nullptr;  ///< [n_embd]: what the layer's ffn gives times sigmoid(it x); null: 1
  std::vector<ExpertOp> all;           ///< [n_expert]; empty: the layer has none

  explicit operator bool() const { return !all.empty(); }
};

struct LayerPlan {
  int64_t index = 0;
  ProjectStage project;  ///< q, k, v, and gates if the heads have such; or a DeltaNet layer's row
  MixStage mix;
  LinearOp out;
  NormOp out_norm;   ///< null: none
  ProjectStage ffn;  ///< gate, up: one matrix of both or two; its norm alone if there are experts
  ExpertsStage experts;
  Activation activation = Activation::silu;
  LinearOp down;
  NormOp down_norm;  ///< null: none
  float residual_scale = 1;
  int64_t n_ff = 0;  ///< of ffn and down; 0: there are experts alone
};

struct OutputPlan {
  NormOp norm;
  LinearOp logits;
};

struct Plan {
  std::vector<LayerPlan> layers;
  OutputPlan output;
};

/// weights outlive it.
Plan make_plan(const ModelWeights& weights);

}  // namespace narrows
