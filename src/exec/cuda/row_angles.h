// What mixers on a device share: the angles and factors of a run's rows, sent once a run, what their kernels
// are told of a layer's heads, the f16 attention of a step with the work space that it needs, and observers.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "exec/cuda/device_mixer.h"
#include "kernels/rope_table.h"
#include "model/plan.h"

namespace narrows {

/// The table that turns a row's heads in a layer.
using RopeOfRow = std::function<const kernels::RopeTable&(int64_t row, const LayerPlan& layer)>;

/// Makes room in `to`, after waiting for what may read it, and sends.
void send_to_device(device::Buffer& to, const void* from, int64_t bytes, device::Stream& stream);

class RowAngles {
 public:
  /// Rows at these positions.
  void begin(std::vector<int64_t> positions, RopeOfRow rope_of);
  /// What all layers need, before the first.
  void send(std::span<const LayerPlan> layers, device::Stream& stream);
  /// Of a layer's rows; where the cache has their tokens (pool to block) is the caller's to say.
  device::StoreArgs store_args(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream);
  int64_t n_rot(const LayerPlan& layer) const { return rope_of_(0, layer).n_rot(); }
  /// [n, n_rot / 2, 2]: cosine, sine.
  const float* angles(const LayerPlan& layer, device::Stream& stream);
  /// [n] or null: on queries. Of all layers whose queries are scaled by position: they share the rule.
  const float* factors(const AttentionSpec& a, device::Stream& stream);

 private:
  struct OfRope {
    int64_t rope = -1;
    device::Buffer angles;
    bool sent = false;
  };
  std::vector<int64_t> positions_;
  RopeOfRow rope_of_;
  std::vector<OfRope> angles_;
  device::Buffer factor_;
  bool factor_sent_ = false;
};

/// Of n rows of a step from `first` on; q: f16 [rows, width_q].
narrows_cuda_heads heads_of(const AttentionSpec& a, const void* q, const DeviceRows& rows, int64_t first,
                            int64_t n);

/// Called on the executor's thread with the first row of each layer, before RoPE, and what was mixed.
using SeenRow =
    std::function<void(int64_t layer, const float* q, const float* k, const float* v, float* out)>;
/// Waits for the device.
void show_row(const LayerPlan& layer, const DeviceRows& rows, const SeenRow& seen, device::Stream& stream);

/// Attention of a step's rows to exact blocks.
class F16Attention {
 public:
  /// n_longest: the most tokens of a row. args.n_max is set here.
  void run(narrows_cuda_f16_args args, int64_t n_longest, device::Stream& stream);

 private:
  device::Buffer workspace_;
  int64_t rows_ = 0, tokens_ = 0;  ///< that it has been zeroed for
};

}  // namespace narrows
