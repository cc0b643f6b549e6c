// Builds and runs the decode graph. Every tensor has its own memory (no reuse): a step's activations are a
// few MB, and eval can read any layer's q, k, v afterwards.
#include "engine/decode_graph.h"

namespace narrows {

/// One phase of one layer.
struct DecodeGraph::Op {
  LayerDecoder* decoder;
  StepScratch* scratch;
  const DecodeStep* step;
  int phase;

  static void compute(ggml_tensor* /*dst*/, int ith, int nth, void* userdata) {
    const Op& op = *static_cast<const Op*>(userdata);
    op.decoder->run_phase(op.phase, *op.step, *op.scratch, ith, nth);
  }
};

Result<std::unique_ptr<DecodeGraph>> DecodeGraph::create(
    const ModelWeights& weights, std::span<const std::unique_ptr<LayerDecoder>> decoders,
    StepScratch* scratch) {
  const Hparams& hp = weights.hparams();
  // Per layer at most 30 tensors and the phases; the views count as tensors too.
  size_t n_op = 0;
  for (const auto& d : decoders) n_op += static_cast<size_t>(d->n_phase());
  const size_t n_tensor = 16 + 40 * decoders.size() + n_op;

  std::unique_ptr<DecodeGraph> g(new DecodeGraph());
  const ggml_init_params params = {
      ggml_tensor_overhead() * n_tensor + ggml_graph_overhead_custom(n_tensor, false), nullptr, true};
  g->ctx_ = ggml_init(params);
  if (g->ctx_ == nullptr) return Status(StatusCode::out_of_memory, "no memory for the decode graph");
  ggml_context* ctx = g->ctx_;
  g->graph_ = ggml_new_graph_custom(ctx, n_tensor, false);
  g->input_ = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hp.n_embd, 1);
  g->steps_.resize(decoders.size());

  std::vector<Qkv> qkv;
  std::vector<ggml_tensor*> out;
  ggml_tensor* x = g->input_;
  for (size_t l = 0; l < decoders.size(); ++l) {
    qkv.push_back(build_qkv(ctx, hp, weights.layer(static_cast<int64_t>(l)), x));
    ggml_tensor* last = nullptr;
    const int n_phase = decoders[l]->n_phase();
    for (int p = 0; p < n_phase; ++p) {
      g->ops_.push_back(std::make_unique<Op>(Op{decoders[l].get(), scratch, &g->steps_[l], p}));
      ggml_tensor* args[4] = {qkv[l].q, qkv[l].k, qkv[l].v, last};
      const int64_t n_out = p + 1 == n_phase ? hp.n_head * hp.head_dim : 1;
      last = ggml_custom_4d(ctx, GGML_TYPE_F32, n_out, 1, 1, 1, args, last == nullptr ? 3 : 4, &Op::compute,
                            GGML_N_TASKS_MAX, g->ops_.back().get());
    }
    out.push_back(last);
    x = build_rest(ctx, hp, weights.layer(static_cast<int64_t>(l)), x, last);
  }
  g->logits_ = build_logits(ctx, weights, x);
  ggml_build_forward_expand(g->graph_, g->logits_);

  g->buffer_ = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
  if (g->buffer_ == nullptr)
    return Status(StatusCode::out_of_memory, "no memory for the activations of a step");
  for (size_t l = 0; l < decoders.size(); ++l) {
    g->steps_[l] = {static_cast<const float*>(qkv[l].q->data), static_cast<const float*>(qkv[l].k->data),
                    static_cast<const float*>(qkv[l].v->data), static_cast<float*>(out[l]->data)};
  }
  return g;
}

DecodeGraph::~DecodeGraph() {
  if (buffer_ != nullptr) ggml_backend_buffer_free(buffer_);
  if (ctx_ != nullptr) ggml_free(ctx_);
}

float* DecodeGraph::input() const { return static_cast<float*>(input_->data); }

Status DecodeGraph::run(GraphRunner& runner) { return runner.run(graph_); }

std::span<const float> DecodeGraph::logits() const {
  return {static_cast<const float*>(logits_->data), static_cast<size_t>(logits_->ne[0])};
}

const DecodeStep& DecodeGraph::step(int64_t layer) const { return steps_[static_cast<size_t>(layer)]; }

}  // namespace narrows
