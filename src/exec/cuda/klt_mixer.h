// The mix stage of a step over klt caches on the executor's device: a row of each sequence. Keys and values
// are stored in exact blocks; sequences that have pages in a layer attend with the klt kernels, one after the
// other because each has transforms of its own; the others with the f16 kernel. What is the same for all
// layers, and what differs by layer, is sent at once before the first.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "exec/cuda/device_mixer.h"
#include "exec/cuda/row_angles.h"
#include "kernels/half.h"
#include "kv/klt/cuda/cuda_klt_layer.h"

namespace narrows {

class KltMixer final : public DeviceMixer {
 public:
  /// The layer of a row's cache.
  using LayerOf = std::function<CudaKltLayer&(int64_t row, int64_t layer)>;

  /// The n rows of the next run, whose steps have begun.
  void begin_step(int64_t n, int64_t n_layer, LayerOf layer_of);

  void begin(std::span<const LayerPlan> layers, device::Stream& stream) override;
  bool is_observed() const override { return static_cast<bool>(seen_); }
  void mix(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) override;
  void finish(device::Stream& stream) override;

  /// As BlockMixer's; the layers of the first row then know what they have read.
  void observe(SeenRow seen) { seen_ = std::move(seen); }

 private:
  /// Of a layer, where its numbers are in numbers_.
  struct Places {
    const int32_t *table, *index, *position, *n_exact, *n_tokens, *budget;
    const uint8_t* count;
  };

  void send_rows(device::Stream& stream);
  Places places(int64_t layer) const;
  void attend(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream);
  void attend_exact(const LayerPlan& layer, const DeviceRows& rows, int64_t first, int64_t n,
                    device::Stream& stream);
  void attend_klt(const LayerPlan& layer, const DeviceRows& rows, int64_t row, device::Stream& stream);
  void note_selection(const narrows_cuda_klt_args& args, const device::Buffer& work, CudaKltLayer& layer,
                      device::Stream& stream) const;
  void keep_queries(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream);
  const KltStepView& view(int64_t row, int64_t layer) const { return layer_of_(row, layer).view(); }

  int64_t n_ = 0, n_layer_ = 0, ld_ = 0;
  LayerOf layer_of_;
  SeenRow seen_;
  bool wants_queries_ = false;
  RowAngles angles_;
  F16Attention exact_;
  std::vector<int32_t> host_;
  device::Buffer numbers_;  ///< of all layers, see places(); then bad [n], sequence [n]
  device::Buffer plain_;    ///< f16 [n, width_q]: queries before RoPE
  device::Buffer queries_;  ///< [layer][n, width_q]: the same in float32, if a layer wants them
  int64_t width_q_ = 0;
  std::vector<float> host_queries_;
};

}  // namespace narrows
