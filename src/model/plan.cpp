#include "model/plan.h"

namespace narrows {

namespace {

ProjectStage project(const NormOp& norm, std::vector<LinearOp> linears) {
  ProjectStage stage{norm, std::move(linears), 0};
  for (const LinearOp& l : stage.linears) stage.n_out += l.w->n_out;
  return stage;
}

ExpertsStage experts_of(const LayerWeights& w, const FfnSpec& ffn, int64_t n_embd) {
  ExpertsStage stage{ffn.experts, {&w.router, w.b_router}, ffn.n_ff, w.shared_gate, {}};
  for (const ExpertWeights& e : w.experts) {
    const auto n_before = static_cast<int64_t>(stage.all.size());
    const auto own = [&](const float* biases, int64_t n) { return biases ? biases + n_before * n : nullptr; };
    std::vector<LinearOp> gate_up = {{&e.gate_up, nullptr}};
    if (!e.gate_up) gate_up = {{&e.gate, nullptr}, {&e.up, nullptr}};
    stage.all.push_back({std::move(gate_up),
                         own(w.b_gates, ffn.n_ff),
                         own(w.b_ups, ffn.n_ff),
                         {&e.down, own(w.b_downs, n_embd)}});
  }
  return stage;
}

std::vector<LinearOp> qkv_of(const LayerWeights& w) {
  std::vector<LinearOp> all;
  for (const Matrix& m : w.delta_in) {
    if (m) all.push_back({&m, nullptr});
  }
  if (!all.empty()) return all;
  if (w.wqkv) return {{&w.wqkv, w.bqkv}};
  all = {{&w.wq, w.bq}, {&w.wk, w.bk}, {&w.wv, w.bv}};
  if (w.wgate) all.push_back({&w.wgate, nullptr});
  return all;
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
    l.project = project(norm(w.attn_norm), qkv_of(w));
    const AttentionSpec& a = spec.layer(i).attention;
    const auto heads = [&](const float* weight, int64_t n_head) {
      return a.qk_norm_whole ? HeadNorms{norm(weight), 1, n_head * a.head_dim}
                             : HeadNorms{norm(weight), n_head, a.head_dim};
    };
    if (const DeltaNetSpec& d = spec.layer(i).delta_net) {
      l.mix.delta_net = {d, w.conv, w.delta_rate, w.delta_step_bias, w.delta_norm, spec.rms_eps};
    } else {
      l.mix = {a, heads(w.q_norm, a.n_head), heads(w.k_norm, a.n_head_kv), w.sinks, {}};
    }
    l.residual_scale = spec.layer(i).residual_scale;
    l.out = {&w.wo, w.bo};
    l.out_norm = norm(w.attn_post_norm);
    const FfnSpec& ffn = spec.layer(i).ffn;
    l.n_ff = ffn.experts ? ffn.experts.n_shared_ff : ffn.n_ff;
    l.activation = ffn.activation;
    if (l.n_ff > 0) {
      std::vector<LinearOp> gate_up = {{&w.gate_up, nullptr}};
      if (!w.gate_up) gate_up = {{&w.gate, w.b_gate}, {&w.up, w.b_up}};
      l.ffn = project(norm(w.ffn_norm), std::move(gate_up));
      l.down = {&w.down, w.b_down};
    } else {
      l.ffn = project(norm(w.ffn_norm), {});
    }
    if (ffn.experts) {
      l.experts = experts_of(w, ffn, spec.n_embd);
      l.experts.spec.scale *= l.residual_scale;
    }
    l.down_norm = norm(w.ffn_post_norm);
    plan.layers.push_back(std::move(l));
  }
  plan.output = {norm(weights.output_norm()), {&weights.output(), weights.output_bias()}};
  return plan;
}

}  // namespace narrows
