#include "model/plan.h"

namespace narrows {

namespace {

ProjectStage project(const NormOp& norm, std::vector<LinearOp> linears) {
  ProjectStage stage{norm, std::move(linears), 0};
  for (const LinearOp& l : stage.linears) stage.n_out += l.w->n_out;
  return stage;
}

ExpertsStage experts_of(const LayerWeights& w, const ExpertSpec& spec) {
  ExpertsStage stage{spec, {&w.router, nullptr}, {}};
  for (const ExpertWeights& e : w.experts) {
    std::vector<LinearOp> gate_up = {{&e.gate_up, nullptr}};
    if (!e.gate_up) gate_up = {{&e.gate, nullptr}, {&e.up, nullptr}};
    stage.all.push_back({std::move(gate_up), {&e.down, nullptr}});
  }
  return stage;
}

}  // namespace

Plan make_plan(const ModelWeights& weights) {
  const ModelSpec& spec = weights.spec();
  const auto norm = [&](const float* weight) { return NormOp{weight, spec.rms_eps}; };
  Plan plan;
  plan.layers.reserve(spec.layers.size());
  for (int64_t i = 0; i < spec.n_layer(); ++i) {
    const LayerWeights& w = weights.layer(i);
    LayerPlan l;
    l.index = i;
    std::vector<LinearOp> qkv = {{&w.wqkv, w.bqkv}};
    if (!w.wqkv) qkv = {{&w.wq, w.bq}, {&w.wk, w.bk}, {&w.wv, w.bv}};
    l.project = project(norm(w.attn_norm), std::move(qkv));
    l.mix = {spec.layer(i).attention, norm(w.q_norm), norm(w.k_norm)};
    l.out = {&w.wo, w.bo};
    l.out_norm = norm(w.attn_post_norm);
    l.n_ff = spec.layer(i).ffn.n_ff;
    l.activation = spec.layer(i).ffn.activation;
    if (w.experts.empty()) {
      std::vector<LinearOp> gate_up = {{&w.gate_up, nullptr}};
      if (!w.gate_up) gate_up = {{&w.gate, w.b_gate}, {&w.up, w.b_up}};
      l.ffn = project(norm(w.ffn_norm), std::move(gate_up));
      l.down = {&w.down, w.b_down};
    } else {
      l.ffn = project(norm(w.ffn_norm), {});
      l.experts = experts_of(w, spec.layer(i).ffn.experts);
    }
    l.down_norm = norm(w.ffn_post_norm);
    plan.layers.push_back(std::move(l));
  }
  plan.output = {norm(weights.output_norm()), {&weights.output(), weights.output_bias()}};
  return plan;
}

}  // namespace narrows
