// ggml graphs of one transformer layer, for any number of tokens, with attention left open: build_qkv() gives
// what attention needs, build_rest() takes what it gave. Prefill builds one layer at a time
// (prefill/prefill.h); a decode step is a program of its own (engine/step_program.h). The architectures
// differ only in which weights exist: llama (no bias), qwen2 (q, k, v bias), qwen3 (q/k norms).
#pragma once

#include <cstdint>
#include <vector>

#include "base/workers.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "model/weights.h"

namespace narrows {

/// Before RoPE. Shape [head_dim, heads, n] each; a view may have gaps between tokens (nb[2]), never inside
/// one.
struct Qkv {
  ggml_tensor* q;
  ggml_tensor* k;
  ggml_tensor* v;
};

/// How a graph multiplies by a weight [k, m]: y [m, n] of x [k, n] floats.
class Products {
 public:
  virtual ~Products() = default;
  virtual ggml_tensor* multiply(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x) = 0;
};

/// x [n_embd, n]: the residual stream before the layer. products null: ggml's own.
Qkv build_qkv(ggml_context* ctx, const Hparams& hp, const LayerWeights& w, ggml_tensor* x,
              Products* products = nullptr);

/// attention [n_head * head_dim, n]; the residual stream after the layer, [n_embd, n].
ggml_tensor* build_rest(ggml_context* ctx, const Hparams& hp, const LayerWeights& w, ggml_tensor* x,
                        ggml_tensor* attention, Products* products = nullptr);

/// Logits [n_vocab, n] of the final residual stream.
ggml_tensor* build_logits(ggml_context* ctx, const ModelWeights& w, ggml_tensor* x,
                          Products* products = nullptr);

/// Runs graphs whose tensors are allocated, on n_threads, keeping ggml's work buffer from run to run; between
/// graphs its threads do other work.
class GraphRunner final : public Workers {
 public:
  explicit GraphRunner(int n_threads) : n_threads_(n_threads) {}
  /// internal if ggml reports a failure.
  Status run(ggml_cgraph* graph);
  int n_threads() const override { return n_threads_; }
  /// As a graph of one op: ggml's threads are awake, and others would only take their cores.
  void for_each(int64_t n, const std::function<void(int64_t)>& task) override;

 private:
  int n_threads_;
  std::vector<uint8_t> work_;
};

}  // namespace narrows
