// A layer's weights, its experts' aside, for many rows, multiplied by oneDNN: unpacked once for a prompt into
// the layout that its product likes, in bfloat16 with float32 sums where the CPU multiplies that, float32
// weights as they are. Where the products of a step round activations to 8 bits in groups, here both factors
// keep 8 significant bits.
#pragma once

#include <cstdint>
#include <memory>

#include "base/workers.h"
#include "model/plan.h"
#include "narrows/status.h"

namespace narrows {

class LoadedLayer {
 public:
  /// Rows that one product takes at most: its activations and results stay in the L2 cache beside a panel of
  /// weights.
  static constexpr int64_t kBlock = 256;

  /// True if this CPU multiplies bfloat16 (AVX512-BF16, AMX).
  static bool has_bf16();
  /// True if all of the layer's matrices have a form here that is worth it on this CPU.
  static bool supports(const LayerPlan& layer);
  /// Peak bytes with a layer loaded and rows of n_in at most.
  static int64_t bytes_needed(const LayerPlan& layer, int n_threads);

  /// workers outlive it. internal: oneDNN does not start.
  static Result<std::unique_ptr<LoadedLayer>> create(Workers& workers);
  ~LoadedLayer();
  LoadedLayer(const LoadedLayer&) = delete;
  LoadedLayer& operator=(const LoadedLayer&) = delete;

  /// Unpacks a layer's weights, in place of what was loaded. out_of_memory; internal: oneDNN failed.
  Status load(const LayerPlan& layer);
  bool holds(const LayerPlan& layer) const;
  /// Makes all that products of up to kBlock rows take: those of m rows and of `rest` (0: none). Before them;
  /// errors as load().
  Status prepare(int64_t m, int64_t rest);

  /// y [m, n_out] = x [m, n_in] W for a matrix of the loaded layer, on the calling thread, which is the ith;
  /// m as prepared. Different threads at once. Errors as load().
  Status multiply(const Matrix& w, const float* x, int64_t m, float* y, int ith);

 private:
  struct Impl;
  explicit LoadedLayer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace narrows
