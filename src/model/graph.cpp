// The layer, op by op. Where llama.cpp computes the same, the order of operations is the same.
#include "model/graph.h"

#include <fmt/format.h>

#include <atomic>
#include <exception>
#include <mutex>

namespace narrows {

namespace {

ggml_tensor* rms_norm(ggml_context* ctx, ggml_tensor* x, float eps, ggml_tensor* weight) {
  return ggml_mul(ctx, ggml_rms_norm(ctx, x, eps), weight);
}

ggml_tensor* linear(ggml_context* ctx, Products* products, ggml_tensor* weight, ggml_tensor* bias,
                    ggml_tensor* x) {
  ggml_tensor* y = products != nullptr ? products->multiply(ctx, weight, x) : ggml_mul_mat(ctx, weight, x);
  return bias != nullptr ? ggml_add(ctx, y, bias) : y;
}

/// Rows [first, first + heads * head_dim) of y [rows, n] as [head_dim, heads, n].
ggml_tensor* heads_of(ggml_context* ctx, ggml_tensor* y, int64_t head_dim, int64_t heads, int64_t first) {
  const size_t item = ggml_element_size(y);
  return ggml_view_3d(ctx, y, head_dim, heads, y->ne[1], static_cast<size_t>(head_dim) * item, y->nb[1],
                      static_cast<size_t>(first) * item);
}

}  // namespace

Qkv build_qkv(ggml_context* ctx, const Hparams& hp, const LayerWeights& w, ggml_tensor* x,
              Products* products) {
  ggml_tensor* h = rms_norm(ctx, x, hp.rms_eps, w.attn_norm);
  const int64_t d = hp.head_dim;
  Qkv out{};
  if (w.wqkv != nullptr) {
    ggml_tensor* y = linear(ctx, products, w.wqkv, w.bqkv, h);
    out.q = heads_of(ctx, y, d, hp.n_head, 0);
    out.k = heads_of(ctx, y, d, hp.n_head_kv, hp.n_head * d);
    out.v = heads_of(ctx, y, d, hp.n_head_kv, (hp.n_head + hp.n_head_kv) * d);
  } else {
    out.q = heads_of(ctx, linear(ctx, products, w.wq, w.bq, h), d, hp.n_head, 0);
    out.k = heads_of(ctx, linear(ctx, products, w.wk, w.bk, h), d, hp.n_head_kv, 0);
    out.v = heads_of(ctx, linear(ctx, products, w.wv, w.bv, h), d, hp.n_head_kv, 0);
  }
  if (w.q_norm != nullptr) out.q = rms_norm(ctx, out.q, hp.rms_eps, w.q_norm);
  if (w.k_norm != nullptr) out.k = rms_norm(ctx, out.k, hp.rms_eps, w.k_norm);
  return out;
}

ggml_tensor* build_rest(ggml_context* ctx, const Hparams& hp, const LayerWeights& w, ggml_tensor* x,
                        ggml_tensor* attention, Products* products) {
  x = ggml_add(ctx, linear(ctx, products, w.wo, w.bo, attention), x);
  ggml_tensor* h = rms_norm(ctx, x, hp.rms_eps, w.ffn_norm);
  ggml_tensor* act = nullptr;
  if (w.gate_up != nullptr) {
    act = ggml_swiglu(ctx, linear(ctx, products, w.gate_up, nullptr, h));
  } else {
    act = ggml_swiglu_split(ctx, linear(ctx, products, w.gate, w.b_gate, h),
                            linear(ctx, products, w.up, w.b_up, h));
  }
  return ggml_add(ctx, linear(ctx, products, w.down, w.b_down, act), x);
}

ggml_tensor* build_logits(ggml_context* ctx, const ModelWeights& w, ggml_tensor* x, Products* products) {
  return linear(ctx, products, w.output(), w.output_bias(),
                rms_norm(ctx, x, w.hparams().rms_eps, w.output_norm()));
}

Status GraphRunner::run(ggml_cgraph* graph) {
  ggml_cplan plan = ggml_graph_plan(graph, n_threads_, nullptr);
  if (work_.size() < plan.work_size) work_.resize(plan.work_size);
  plan.work_data = work_.data();
  const ggml_status status = ggml_graph_compute(graph, &plan);
  if (status == GGML_STATUS_SUCCESS) return {};
  return {StatusCode::internal,
          fmt::format("ggml could not compute a graph: {}", ggml_status_to_string(status))};
}

namespace {

/// Tasks that threads take one by one.
struct TaskList {
  int64_t n;
  const std::function<void(int64_t)>& task;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr thrown;  ///< the first; must not reach ggml's threads

  void work() {
    for (int64_t i = next++; i < n; i = next++) {
      try {
        task(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!thrown) thrown = std::current_exception();
      }
    }
  }
  static void op(ggml_tensor* /*dst*/, int /*ith*/, int /*nth*/, void* list) {
    static_cast<TaskList*>(list)->work();
  }
};

}  // namespace

void GraphRunner::for_each(int64_t n, const std::function<void(int64_t)>& task) {
  TaskList list{n, task, {}, {}, {}};
  std::vector<uint8_t> memory(ggml_tensor_overhead() * 4 + ggml_graph_overhead_custom(4, false));
  ggml_context* ctx = ggml_init({memory.size(), memory.data(), true});
  ggml_tensor* nothing = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
  ggml_tensor* op =
      ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &nothing, 1, &TaskList::op, GGML_N_TASKS_MAX, &list);
  float cell[2] = {};
  nothing->data = &cell[0];
  op->data = &cell[1];
  ggml_cgraph* graph = ggml_new_graph_custom(ctx, 4, false);
  ggml_build_forward_expand(graph, op);
  const Status status = run(graph);
  ggml_free(ctx);
  if (!status.ok()) list.work();  // all tasks are still there
  if (list.thrown) std::rethrow_exception(list.thrown);
}

}  // namespace narrows
