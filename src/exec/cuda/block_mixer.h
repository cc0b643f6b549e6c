// The mix stage over f16 caches in blocks on the executor's device: rows' queries and keys are rotated, keys
// and values stored, and attention runs there; of a step one row of each sequence, of a prompt rows of one.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "exec/cuda/device_mixer.h"
#include "exec/cuda/row_angles.h"
#include "kv/f16/cuda/block_pool.h"

namespace narrows {

class BlockMixer final : public DeviceMixer {
 public:
  struct Row {
    BlockSequence* blocks = nullptr;
    int64_t position = 0;
  };
  /// The rows of the next run, of a step; room for their tokens has been made.
  void begin_step(std::span<const Row> rows, RopeOfRow rope_of);
  /// Or n rows of a prompt, from position `first` on.
  void begin_prompt(BlockSequence& blocks, int64_t first, int64_t n, RopeOfRow rope_of);

  void begin(std::span<const LayerPlan> layers, device::Stream& stream) override;
  bool is_observed() const override { return seen_ || see_rows_; }
  void mix(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) override;
  void finish(device::Stream& stream) override;

  /// Empty: not.
  void observe(SeenRow seen) { seen_ = std::move(seen); }
  /// Called with the rows of each layer when its work has begun, of prompts: whoever wants them waits for
  /// them. Empty: not.
  using Rows = std::function<void(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream)>;
  void see_rows(Rows see) { see_rows_ = std::move(see); }

 private:
  void begin_angles(RopeOfRow rope_of);
  void send_rows(device::Stream& stream);
  void attend(const LayerPlan& layer, const DeviceRows& rows, const device::StoreArgs& store,
              device::Stream& stream);
  void attend_step(const LayerPlan& layer, const DeviceRows& rows, const narrows_cuda_blocks& blocks,
                   device::Stream& stream);

  std::vector<Row> rows_;
  bool is_prompt_ = false;
  RowAngles angles_;
  SeenRow seen_;
  Rows see_rows_;
  int64_t ld_table_ = 0;
  std::vector<int32_t> host_;  ///< of the parts below, one after another
  device::Buffer table_;       ///< [sequences, ld_table_]
  device::Buffer numbers_;     ///< position [n], sequence [n], tokens [n], bad [n]
  F16Attention attention_;
};

}  // namespace narrows
