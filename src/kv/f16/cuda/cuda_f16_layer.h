// A layer of an f16 cache whose tokens lie on a GPU. What a step or a prompt of its executor brings is
// written there by the executor (exec/cuda/block_mixer.h); the layer counts. What the host brings or asks for
// is copied, in the numbers and the saved form of kv/f16/f16_layer.h.
#pragma once

#include <memory>

#include "kernels/ops.h"
#include "kv/f16/cuda/block_pool.h"
#include "kv/kv_layer.h"

namespace narrows {

class CudaF16Layer final : public KvLayer {
 public:
  /// blocks: of all layers of the cache; this one is `index`.
  CudaF16Layer(const AttentionShape& shape, const kernels::RopeTable* rope, int64_t index,
               std::shared_ptr<BlockSequence> blocks)
      : KvLayer(shape, rope), index_(index), blocks_(std::move(blocks)) {}

  /// k and v null: they are in their blocks already.
  Status append(const float* k, const float* v, int64_t n) override;
  Status make_room(bool may_convert) override;
  void store_step(const float* /*k*/, const float* /*v*/) override {}
  void count_step() override { ++size_; }
  void read(int64_t first, int64_t n, float* k, float* v) const override;
  bool can_keep(int64_t n) const override { return n <= size_; }
  void keep(int64_t n) override;
  Status share(const KvLayer& from, int64_t n) override;
  void save(SnapshotWriter& out) const override;
  Status load(SnapshotReader& in) override;
  int64_t n_tokens() const override { return size_; }
  LayerBytes bytes() const override;
  void clear() override { keep(0); }

  /// The executor attends; there are no phases.
  Status begin_step(StepScratch& scratch) override;
  int n_phase() const override { return 0; }
  void run_phase(int, const DecodeStep&, StepScratch&, int, int) override {}

  BlockSequence& blocks() const { return *blocks_; }

 private:
  /// Block b, [2][n_head_kv, 64, head_dim] f16 as it is on the device; NaN if the device does not answer.
  void fetch(int64_t b, kernels::f16_t* to) const;
  Status put(int64_t b, const kernels::f16_t* from);
  int64_t halves() const { return 2 * shape().width() * device::kBlockTokens; }

  int64_t index_;
  std::shared_ptr<BlockSequence> blocks_;
  int64_t size_ = 0;
};

}  // namespace narrows
