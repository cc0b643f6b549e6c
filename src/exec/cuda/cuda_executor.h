// The executor of a GPU: a layer is a chain of the table's operators (device/device_api.h) in one stream. Few
// rows are rounded to bytes and multiplied with the tiles, as on the CPU; many are bf16, with the layer
// unpacked. What rows attend to is on the device too (DeviceMixer), and then a step comes back to the host
// with its logits alone; or it is the host's, whose threads mix: queries, keys and values of a layer are
// fetched, and what is mixed is sent.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "base/memory_ledger.h"
#include "base/thread_pool.h"
#include "exec/cuda/cuda_weights.h"
#include "exec/cuda/device_mixer.h"
#include "exec/executor.h"

namespace narrows {

class CudaExecutor final : public Executor {
 public:
  /// The most rows whose logits a run gives.
  static constexpr int64_t kFewRows = 64;

  /// All outlive it. out_of_memory; internal: the device's errors.
  static Result<std::unique_ptr<CudaExecutor>> create(const ModelSpec& spec, const Plan& plan,
                                                      const CudaWeights& weights, int n_threads);

  int n_threads() const override { return pool_->n_threads(); }
  void for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) override {
    pool_->for_each_thread(n, task);
  }
  Status reserve(int64_t n, bool loaded) override;
  void shrink() override;
  bool can_load(const LayerPlan& /*layer*/) const override { return true; }
  Status load_layer(const LayerPlan& layer) override;
  Status run(const Run& run) override;
  void measure(bool on) override;
  const Times& times() const override { return times_; }
  const void* loaded_output() const override;
  device::Stream* stream() override { return stream_.get(); }

 private:
  class Host;
  /// Sizes of the largest layer.
  struct Widths {
    int64_t embd, qkv, q, gate_up, input, layer;  ///< layer: numbers of all its matrices
    int64_t added;                                ///< embd if a layer norms or scales what it adds, else 0
  };
  /// Rows on the device in the forms that products take.
  struct Input {
    int64_t n = 0, width = 0;
  };

  CudaExecutor(const ModelSpec& spec, const Plan& plan, const CudaWeights& weights);
  /// The rows of a run on the device.
  float* residual(const Run& run);
  void run_layer(const Run& run, const LayerPlan& plan, int64_t from);
  void mix(const Run& run, const LayerPlan& plan, int64_t from);
  void mix_on_host(const Run& run, const LayerPlan& plan, int64_t from);
  void run_logits(const Run& run);
  Input prepare(device::PrepareArgs args, bool bf16);
  /// y (+)= w input + bias, outputs of the matrices side by side; index: of the first among the loaded
  /// layer's, -1: they are not loaded.
  void multiply(std::span<const CudaLinear> matrices, const Input& in, int index, float* y, int64_t ldy,
                bool accumulate);
  void add_product(const LayerPlan& plan, const CudaLinear& l, const float* norm, float eps, const Input& in,
                   int index, float* x);
  void finish(RunStage stage);

  const ModelSpec& spec_;
  const Plan& plan_;
  const CudaWeights& weights_;
  const Widths width_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<device::Stream> stream_;
  MemoryClaim claim_{MemoryUse::scratch};

  int64_t rows_ = 0;  ///< reserved
  bool has_layer_ = false;
  device::Buffer x_;                          ///< [rows, embd]
  device::Buffer qkv_;                        ///< [rows, qkv]
  device::Buffer q16_;                        ///< f16 [rows, q]
  device::Buffer mixed_;                      ///< f16 [rows, q], or float32 from the host
  device::Buffer gate_up_;                    ///< [rows, gate_up]
  device::Buffer added_;                      ///< [rows, added]
  device::Buffer code_, scale_, bf16_, f32_;  ///< inputs of a product [rows, input]
  device::Buffer logits_;                     ///< [kFewRows, n_vocab]
  device::Buffer layer_;                      ///< bf16 matrices of the loaded layer
  const LayerPlan* loaded_ = nullptr;
  std::vector<const void*> loaded_matrices_;
  AlignedArray<float> host_qkv_, host_mixed_;  ///< for mixing on the host

  bool measure_ = false;
  int64_t last_ns_ = 0;
  Times times_{};
};

}  // namespace narrows
