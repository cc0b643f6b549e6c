// The mix stage of a run whose caches lie on the executor's device.
#pragma once

#include <span>

#include "device/device.h"
#include "model/plan.h"

namespace narrows {

/// Queries, keys and values of n rows before RoPE, on the device, row r at r * ld; norms of heads are done.
/// q16, out: f16 [n, width_q], to work in and for what is mixed.
struct DeviceRows {
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
  int64_t ld = 0;
  void* q16 = nullptr;
  void* out = nullptr;
  int64_t n = 0;
  int64_t from = 0;  ///< rows before it are not mixed, only stored
};

class DeviceMixer {
 public:
  virtual ~DeviceMixer() = default;
  /// Before the first layer of a run: sends what its layers need.
  virtual void begin(std::span<const LayerPlan> layers, device::Stream& stream) = 0;
  /// True if somebody looks at each layer's numbers: then the host waits for them.
  virtual bool is_observed() const = 0;
  /// Begins the work of a layer; errors are the stream's.
  virtual void mix(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) = 0;
  /// After the last layer of a run.
  virtual void finish(device::Stream& stream) = 0;
};

}  // namespace narrows
