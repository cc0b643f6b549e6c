// KIVI (arXiv:2402.02750) storage of a layer: ROTATED keys quantised per channel in groups of 32 consecutive
// tokens, values per token in groups of 32 channels. Every token is read; pages are dequantised a tile at a
// time.
#pragma once

#include "base/part.h"
#include "kv/step/step_scratch.h"
#include "kv/window/windowed_layer.h"

namespace narrows {

/// A key group is 32 tokens, so tokens leave the window 32 at a time.
inline constexpr int64_t kKiviUnit = kernels::kGroup;

class KiviLayer final : public WindowedLayer {
 public:
  KiviLayer(const AttentionShape& shape, const kernels::RopeTable* rope, const WindowPlan& plan,
            const KiviLayout& layout)
      : WindowedLayer(shape, rope, plan, layout.bytes()), layout_(layout) {}

  const KiviLayout& layout() const { return layout_; }

  /// Phase 0: each thread attends to its slices of exact blocks and of pages. Phase 1: merge.
  Status begin_step(StepScratch& scratch) override;
  int n_phase() const override { return 2; }
  void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) override;
  bool always_reads(int64_t /*pos*/) const override { return true; }

  /// Keys of one page and KV head, rotated: k_t [head_dim, kPageTokens]. Columns from page_tokens(p) on are
  /// NaN.
  void read_keys(int64_t p, int64_t head, float* k_t) const;
  /// Values [n, D] of n slots of a page from `slot` on.
  void read_values(int64_t p, int64_t slot, int64_t n, float* v) const;

 protected:
  Status encode(int64_t first, int64_t last, const Incoming& incoming) override;
  void decode(int64_t first, int64_t n, float* k, float* v) const override;

 private:
  void attend_pages(StepScratch& scratch, Part slices, StepScratch::Thread& thread) const;

  KiviLayout layout_;
};

}  // namespace narrows
