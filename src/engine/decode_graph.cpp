// Builds and runs the decode graph. Every tensor has its own memory (no reuse): a step's activations are a
// few MB, and eval can read any layer's q, k, v afterwards.
#include "engine/decode_graph.h"

#include <algorithm>

#include "model/column_products.h"

namespace narrows {

/// One phase of one layer, for all lanes. A lane with fewer phases joins late: all end in the last node,
/// which owns the output.
struct DecodeGraph::Op {
  const DecodeGraph* graph;
  size_t layer;
  int phase;

  static void compute(ggml_tensor* /*dst*/, int ith, int nth, void* userdata) {
    const Op& op = *static_cast<const Op*>(userdata);
    const DecodeGraph& g = *op.graph;
    for (size_t i = 0; i < g.lanes_.size(); ++i) {
      LayerDecoder& decoder = *g.lanes_[i].decoders[op.layer];
      const int phase = op.phase - (g.n_phase_[op.layer] - decoder.n_phase());
      if (phase < 0) continue;
      decoder.run_phase(phase, g.steps_[op.layer * g.lanes_.size() + i], *g.lanes_[i].scratch, ith, nth);
    }
  }
};

std::vector<int> phases_of(std::span<const DecodeLane> lanes) {
  std::vector<int> most;
  for (const DecodeLane& lane : lanes) {
    most.resize(std::max(most.size(), lane.decoders.size()));
    for (size_t l = 0; l < lane.decoders.size(); ++l)
      most[l] = std::max(most[l], lane.decoders[l]->n_phase());
  }
  return most;
}

Result<std::unique_ptr<DecodeGraph>> DecodeGraph::create(const ModelWeights& weights, int n_lane,
                                                         std::span<const int> n_phase) {
  const Hparams& hp = weights.hparams();
  ColumnProducts products;
  // Per layer at most 30 tensors, those that several columns cost more, and the phases; the views count as
  // tensors too.
  size_t n_op = 0;
  for (const int n : n_phase) n_op += static_cast<size_t>(n);
  const size_t n_tensor = 16 + (40 + 8 * ColumnProducts::more_tensors(n_lane)) * n_phase.size() + n_op;

  std::unique_ptr<DecodeGraph> g(new DecodeGraph());
  const ggml_init_params params = {
      ggml_tensor_overhead() * n_tensor + ggml_graph_overhead_custom(n_tensor, false), nullptr, true};
  g->ctx_ = ggml_init(params);
  if (g->ctx_ == nullptr) return Status(StatusCode::out_of_memory, "no memory for the decode graph");
  ggml_context* ctx = g->ctx_;
  g->graph_ = ggml_new_graph_custom(ctx, n_tensor, false);
  g->input_ = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hp.n_embd, n_lane);
  g->n_phase_.assign(n_phase.begin(), n_phase.end());
  g->lanes_.resize(static_cast<size_t>(n_lane));
  g->steps_.resize(n_phase.size() * g->lanes_.size());

  std::vector<Qkv> qkv;
  std::vector<ggml_tensor*> out;
  ggml_tensor* x = g->input_;
  for (size_t l = 0; l < n_phase.size(); ++l) {
    const LayerWeights& w = weights.layer(static_cast<int64_t>(l));
    qkv.push_back(build_qkv(ctx, hp, w, x, &products));
    ggml_tensor* last = nullptr;
    for (int p = 0; p < n_phase[l]; ++p) {
      g->ops_.push_back(std::make_unique<Op>(Op{g.get(), l, p}));
      ggml_tensor* args[4] = {qkv[l].q, qkv[l].k, qkv[l].v, last};
      const bool is_last = p + 1 == n_phase[l];
      last = ggml_custom_4d(ctx, GGML_TYPE_F32, is_last ? hp.n_head * hp.head_dim : 1, is_last ? n_lane : 1,
                            1, 1, args, last == nullptr ? 3 : 4, &Op::compute, GGML_N_TASKS_MAX,
                            g->ops_.back().get());
    }
    out.push_back(last);
    x = build_rest(ctx, hp, w, x, last, &products);
  }
  g->logits_ = build_logits(ctx, weights, x, &products);
  ggml_build_forward_expand(g->graph_, g->logits_);

  g->buffer_ = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
  if (g->buffer_ == nullptr)
    return Status(StatusCode::out_of_memory, "no memory for the activations of a step");
  const auto column = [](const ggml_tensor* t, size_t stride, size_t i) {
    return reinterpret_cast<float*>(static_cast<char*>(t->data) + i * stride);
  };
  for (size_t l = 0; l < n_phase.size(); ++l) {
    const Qkv& t = qkv[l];
    for (size_t i = 0; i < g->lanes_.size(); ++i) {
      g->steps_[l * g->lanes_.size() + i] = {column(t.q, t.q->nb[2], i), column(t.k, t.k->nb[2], i),
                                             column(t.v, t.v->nb[2], i), column(out[l], out[l]->nb[1], i)};
    }
  }
  return g;
}

DecodeGraph::~DecodeGraph() {
  if (buffer_ != nullptr) ggml_backend_buffer_free(buffer_);
  if (ctx_ != nullptr) ggml_free(ctx_);
}

bool DecodeGraph::has_phases(std::span<const int> n_phase) const {
  return std::equal(n_phase.begin(), n_phase.end(), n_phase_.begin(), n_phase_.end(), std::less_equal<int>());
}

float* DecodeGraph::input(int lane) const { return static_cast<float*>(input_->data) + lane * input_->ne[0]; }

Status DecodeGraph::run(std::span<const DecodeLane> lanes, GraphRunner& runner) {
  std::copy(lanes.begin(), lanes.end(), lanes_.begin());
  return runner.run(graph_);
}

std::span<const float> DecodeGraph::logits(int lane) const {
  return {static_cast<const float*>(logits_->data) + lane * logits_->ne[0],
          static_cast<size_t>(logits_->ne[0])};
}

const DecodeStep& DecodeGraph::step(int64_t layer, int lane) const {
  return steps_[static_cast<size_t>(layer) * lanes_.size() + static_cast<size_t>(lane)];
}

}  // namespace narrows
