// The plain cache of a layer: every token exact in f16, none encoded. Used by profile f16 and by the dense
// layers of others.
#pragma once

#include "cache/exact_store.h"
#include "cache/layer_cache.h"

namespace narrows {

class F16Layer final : public LayerCache {
 public:
  F16Layer(const AttentionShape& shape, const kernels::RopeTable* rope)
      : LayerCache(shape, rope), store_(shape, rope, kDenseBlock) {}

  Status append(const float* k, const float* v, int64_t n) override;
  Status prepare_step() override;
  void store_step(const float* k, const float* v) override {
    step_is_finite_ = store_.store_step(store_.size(), k, v);
  }
  void finish_step() override { store_.count_step(); }
  void read(int64_t first, int64_t n, float* k, float* v) const override { store_.read(first, n, k, v); }
  bool can_keep(int64_t n) const override { return n <= store_.size(); }
  void keep(int64_t n) override;
  Status share(const LayerCache& from, int64_t n) override;
  void save(SnapshotWriter& out) const override { store_.save(out); }
  Status load(SnapshotReader& in) override;
  int64_t n_tokens() const override { return store_.size(); }
  LayerBytes bytes() const override { return {.exact = store_.bytes()}; }
  void clear() override;

  const ExactStore& store() const { return store_; }

 private:
  ExactStore store_;
  bool step_is_finite_ = true;
};

}  // namespace narrows
