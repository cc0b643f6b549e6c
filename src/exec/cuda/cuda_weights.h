// A model's weights on a GPU: the plan's matrices as the CPU holds them, tiles or rows, its norms and biases,
// in one piece of memory.
#pragma once

#include <memory>
#include <vector>

#include "device/device.h"
#include "model/plan.h"

namespace narrows {

struct CudaLinear {
  device::Weights w{};
  const float* bias = nullptr;
};

/// As LayerPlan; every pointer is the device's.
struct CudaLayer {
  const float* project_norm = nullptr;
  std::vector<CudaLinear> project;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  CudaLinear out;
  const float* out_norm = nullptr;
  const float* ffn_norm = nullptr;
  std::vector<CudaLinear> ffn;
  CudaLinear down;
  const float* down_norm = nullptr;
};

class CudaWeights {
 public:
  /// unsupported: what this executor does not compute, experts say; out_of_memory with both figures.
  static Result<std::unique_ptr<CudaWeights>> upload(std::shared_ptr<device::Device> device,
                                                     const ModelSpec& spec, const Plan& plan);

  const std::shared_ptr<device::Device>& device() const { return device_; }
  const CudaLayer& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  const float* output_norm() const { return output_norm_; }
  const CudaLinear& logits() const { return logits_; }
  int64_t bytes() const { return memory_.bytes(); }
  /// True if a matrix is held in rows, which take inputs in float32.
  bool has_rows() const { return has_rows_; }

 private:
  class Upload;
  std::shared_ptr<device::Device> device_;
  device::Buffer memory_;
  std::vector<CudaLayer> layers_;
  const float* output_norm_ = nullptr;
  CudaLinear logits_;
  bool has_rows_ = false;
};

}  // namespace narrows
