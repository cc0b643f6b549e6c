// The plain cache of a layer: every token exact in f16, none encoded. Used by profile f16 and by the dense
// layers of others.
#pragma once

#include "kv/kv_layer.h"
#include "kv/window/exact_store.h"

namespace narrows {

class F16Layer final : public KvLayer {
 public:
  F16Layer(const AttentionShape& shape, const kernels::RopeTable* rope)
      : KvLayer(shape, rope), store_(shape, rope, kDenseBlock) {}

  Status append(const float* k, const float* v, int64_t n) override;
  Status make_room(bool may_convert) override;
  void store_step(const float* k, const float* v) override {
    step_is_finite_ = store_.store_step(store_.size(), k, v);
  }
  void count_step() override { store_.count_step(); }
  void read(int64_t first, int64_t n, float* k, float* v) const override { store_.read(first, n, k, v); }
  bool can_keep(int64_t n) const override { return n <= store_.size(); }
  void keep(int64_t n) override;
  Status share(const KvLayer& from, int64_t n) override;
  void save(SnapshotWriter& out) const override { store_.save(out); }
  Status load(SnapshotReader& in) override;
  int64_t n_tokens() const override { return store_.size(); }
  LayerBytes bytes() const override { return {.exact = store_.bytes()}; }
  void clear() override;

  /// Phase 0: each thread attends to its slices of blocks. Phase 1: merge.
  Status begin_step(StepScratch& scratch) override;
  int n_phase() const override { return 2; }
  void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) override;

  const ExactStore& store() const { return store_; }

 private:
  ExactStore store_;
  bool step_is_finite_ = true;
};

}  // namespace narrows
