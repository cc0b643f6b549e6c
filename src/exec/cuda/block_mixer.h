// The mix stage over f16 caches in blocks on the executor's device: rows' queries and keys are rotated, keys
// and values stored, and attention runs there; of a step one row of each sequence, of a prompt rows of one.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "exec/cuda/device_mixer.h"
#include "kernels/rope_table.h"
#include "kv/f16/cuda/block_pool.h"

namespace narrows {

class BlockMixer final : public DeviceMixer {
 public:
  struct Row {
    BlockSequence* blocks = nullptr;
    int64_t position = 0;
  };
  /// The table that turns a row's heads in a layer.
  using RopeOf = std::function<const kernels::RopeTable&(int64_t row, const LayerPlan& layer)>;

  /// The rows of the next run, of a step; room for their tokens has been made.
  void begin_step(std::span<const Row> rows, RopeOf rope_of);
  /// Or n rows of a prompt, from position `first` on.
  void begin_prompt(BlockSequence& blocks, int64_t first, int64_t n, RopeOf rope_of);

  void mix(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) override;
  void finish(device::Stream& stream) override;

  /// Called on the executor's thread with the first row of each layer, before RoPE, and what was mixed; it
  /// waits for the device. Empty: not.
  using Seen = std::function<void(int64_t layer, const float* q, const float* k, const float* v, float* out)>;
  void observe(Seen seen) { seen_ = std::move(seen); }

 private:
  void send_rows(device::Stream& stream);
  const float* angles(const LayerPlan& layer, device::Stream& stream);
  const float* factors(const AttentionSpec& a, device::Stream& stream);
  void attend_step(const LayerPlan& layer, const DeviceRows& rows, const narrows_cuda_blocks& blocks,
                   device::Stream& stream);
  void show(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) const;
  void send(device::Buffer& to, const void* from, int64_t bytes, device::Stream& stream);

  std::vector<Row> rows_;
  bool is_prompt_ = false;
  bool sent_ = false;  ///< what is the same for all layers
  RopeOf rope_of_;
  Seen seen_;
  int64_t ld_table_ = 0;
  std::vector<int32_t> host_;  ///< of the parts below, one after another
  device::Buffer table_;       ///< [sequences, ld_table_]
  device::Buffer numbers_;     ///< position [n], sequence [n], tokens [n], bad [n]
  struct OfRope {
    int64_t rope = -1;
    device::Buffer angles;  ///< [n, n_rot / 2, 2]
    bool sent = false;
  };
  std::vector<OfRope> angles_;
  device::Buffer factor_;  ///< [n]
  bool factor_sent_ = false;
  device::Buffer workspace_;
  int64_t workspace_rows_ = 0, workspace_tokens_ = 0;  ///< that it has been zeroed for
};

}  // namespace narrows
