// The executor of CPUs: all threads run a layer together, from its first stage to its last, share each
// product and meet at as few barriers as its data needs,
//
//   norm, q k v | mix | out, residual | norm, gate, up, activation | down, residual |
//
// a "|" each. There are two ways to share a product. By outputs: every thread computes some outputs of all
// rows, out of packed tiles; the weights are read once, which is what bounds a step. What is small, norms and
// the rounding of inputs to bytes, every thread does for itself while rows are few. By rows: every thread
// computes all outputs of some rows, out of a loaded layer; then stages follow each other without a barrier.
// Experts are never loaded: of a chunk's rows few go through each (expert_ffn.h).
#pragma once

#include <memory>
#include <vector>

#include "base/aligned.h"
#include "base/guarded.h"
#include "base/memory_ledger.h"
#include "base/thread_pool.h"
#include "exec/cpu/expert_ffn.h"
#include "exec/cpu/linear.h"
#include "exec/cpu/loaded_layer.h"
#include "exec/executor.h"

namespace narrows {

class CpuExecutor final : public Executor {
 public:
  /// More rows share norms and rounding; the most whose logits a run gives.
  static constexpr int64_t kFewRows = 64;

  /// spec and plan outlive it. out_of_memory: the system gives no more threads.
  static Result<std::unique_ptr<CpuExecutor>> create(const ModelSpec& spec, const Plan& plan, int n_threads);

  int n_threads() const override { return pool_->n_threads(); }
  void for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) override {
    pool_->for_each_thread(n, task);
  }
  Status reserve(int64_t n, bool loaded) override;
  void shrink() override;
  bool can_load(const LayerPlan& layer) const override { return LoadedLayer::supports(layer); }
  Status load_layer(const LayerPlan& layer) override;
  Status run(const Run& run) override;
  void measure(bool on) override;
  const Times& times() const override { return times_; }

  /// Peak bytes of a prompt's chunks of n rows, beside the weights.
  static int64_t bytes_needed(const ModelSpec& spec, const Plan& plan, int64_t n, bool loaded, int n_threads);

 private:
  class Thread;
  /// Sizes of the largest layer.
  struct Widths {
    int64_t embd, qkv, q, ff, wide,
        input;      ///< wide: outputs of a product, input: its inputs; none of experts
    int64_t added;  ///< embd if a layer norms or scales what it adds, else 0
  };
  /// What one thread works in.
  struct Worker {
    LinearInput input;
    AlignedArray<float> norm;  ///< [kFewRows at most, n_embd]; of a loaded layer [block, n_embd]
    AlignedArray<float> wide;  ///< [block, outputs of a product] of a loaded layer
    AlignedArray<float> act;   ///< [block, n_ff] of a loaded layer
  };
  /// Rows that a product by outputs takes.
  struct Input {
    const float* x;
    int64_t ld, n, n_in;
    bool rounded;  ///< to bytes_, by all threads
  };
  /// A product by outputs and where they go.
  struct Output {
    Linear w;
    const float* bias;  ///< [n_out] or null
    float* y;           ///< [n, ldy]
    int64_t ldy;
    bool accumulate;
  };

  CpuExecutor(const ModelSpec& spec, const Plan& plan);
  static Widths widths_of(const ModelSpec& spec, const Plan& plan);
  /// Rows of a task by rows: as many tasks as threads, or a multiple of that.
  static int64_t block_rows(int64_t n, int n_threads);

  void run_thread(Thread& t);
  void run_by_outputs(const LayerPlan& layer, int64_t from, Thread& t);
  void run_by_rows(const LayerPlan& layer, int64_t from, Thread& t);
  void mix(const LayerPlan& layer, Thread& t);
  void gate_mixed(const LayerPlan& layer, int64_t from, Thread& t);
  void weigh_shared(const LayerPlan& layer, int64_t r, int64_t n, float* act) const;
  void run_logits(Thread& t);

  Input normed(const NormOp& norm, std::span<const LinearOp> linears, int64_t from, Thread& t);
  Input taken(const float* x, int64_t ld, int64_t n, const LinearOp& linear, Thread& t);
  LinearInput& block_of(const Input& in, int64_t first, Thread& t);
  void multiply(std::span<const Output> outputs, const Input& in, Thread& t);
  void add_product(const LayerPlan& layer, const LinearOp& linear, const NormOp& norm, const Input& in,
                   float* x, Thread& t);
  void activate(const LayerPlan& layer, const Input& in, Thread& t);
  void norm_rows(const NormOp& norm, int64_t first, int64_t m, float* y) const;
  Status project_rows(const LayerPlan& layer, int64_t first, int64_t m, Thread& t);
  Status add_rows(const LayerPlan& layer, const LinearOp& linear, const NormOp& norm, const float* from,
                  int64_t first, int64_t m, Thread& t);
  Status out_rows(const LayerPlan& layer, int64_t first, int64_t m, Thread& t);
  Status ffn_rows(const LayerPlan& layer, int64_t first, int64_t m, Thread& t);
  Status down_rows(const LayerPlan& layer, int64_t first, int64_t m, Thread& t);
  void finish_stage(RunStage stage, Thread& t);

  const ModelSpec& spec_;
  const Plan& plan_;
  const Widths width_;
  MemoryClaim claim_{MemoryUse::scratch};  ///< for few rows; what more a prompt takes belongs to the prompt
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<LoadedLayer> loaded_;
  std::unique_ptr<ExpertFfn> experts_;
  std::vector<Worker> workers_;
  int64_t rows_ = 0;             ///< reserved, by outputs
  int64_t loaded_rows_ = 0;      ///< reserved, by rows
  AlignedArray<float> qkv_;      ///< [rows, width_.qkv]
  AlignedArray<float> mixed_;    ///< [rows, width_.q]
  AlignedArray<float> gate_up_;  ///< [2][rows, width_.ff]; the first becomes the activation
  AlignedArray<float> added_;   ///< [rows, width_.added] that are normed or scaled before they are added to x
  AlignedArray<float> normed_;  ///< [rows, n_embd], if rows are many
  ByteInput bytes_;             ///< the same, of any input

  const Run* run_ = nullptr;  ///< the running one
  FirstError error_;
  bool measure_ = false;
  int64_t last_ns_ = 0;
  Times times_{};
};

}  // namespace narrows
