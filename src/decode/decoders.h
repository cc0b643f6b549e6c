// The decoders behind LayerDecoder: dense_decoder.cpp reads every token, sals_decoder.cpp the selected ones.
#pragma once

#include "cache/f16_layer.h"
#include "cache/kivi_layer.h"
#include "cache/klt_layer.h"
#include "cache/sals_layer.h"
#include "decode/klt_work.h"
#include "decode/layer_decoder.h"
#include "decode/stages.h"

namespace narrows {

/// F16 and KIVI layers: all tokens. Phase 0: the last thread stores the new token; each attends to its slices
/// of blocks and pages. Phase 1: merge.
class DenseDecoder final : public LayerDecoder {
 public:
  explicit DenseDecoder(F16Layer& layer) : cache_(layer), exact_{&layer.store(), nullptr} {}
  explicit DenseDecoder(KiviLayer& layer)
      : cache_(layer), kivi_(&layer), exact_{&layer.sinks(), &layer.window()} {}

  Status prepare(StepScratch& scratch) override;
  int n_phase() const override { return 2; }
  void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) override;
  void finish() override { cache_.finish_step(); }

 private:
  void attend_pages(StepScratch& scratch, Part slices, StepScratch::Thread& thread);

  LayerCache& cache_;
  KiviLayer* kivi_ = nullptr;
  ExactBlocks exact_;
};

/// SALS layers. Phase 0: store the new token, score. 1: select (one thread), attend to exact blocks (the
/// others). 2: rebuild the selected and attend to them. 3: merge. A layer that waits for its basis has no
/// pages, so that nothing is scored or selected; its number of phases is the same, because the engine's graph
/// is built once.
class SalsDecoder final : public LayerDecoder {
 public:
  SalsDecoder(SalsLayer& layer, const KvProfile& profile)
      : layer_(layer), profile_(profile), exact_{&layer.sinks(), &layer.window()} {}

  Status prepare(StepScratch& scratch) override;
  int n_phase() const override { return 4; }
  void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) override;
  void finish() override { layer_.finish_step(); }
  std::optional<std::span<const int32_t>> last_selection(int64_t head_kv) const override;

 private:
  bool reads_all() const { return n_selected_ == layer_.n_in_pages(); }
  std::span<const int32_t> slice_of_selected(const StepScratch& scratch, int64_t i) const;
  void attend_slices(StepScratch& scratch, Part slices, StepScratch::Thread& thread);

  SalsLayer& layer_;
  KvProfile profile_;
  ExactBlocks exact_;
  int64_t n_selected_ = 0;
  bool sparse_ = false;             ///< the last step left tokens out
  std::vector<int32_t> positions_;  ///< [n_selected_], those of the last step
};

/// klt layers. Phases: store the new token, attend to exact blocks, score; pool, candidates; select, two
/// tasks a KV head; rebuild what the hot keys lack, attend, a slice of the pages a task; merge. Without a
/// choice to make the second is left out, without pages all but the first and the last. As with SALS, a layer
/// that waits for its transforms has no pages.
class KltDecoder final : public LayerDecoder {
 public:
  KltDecoder(KltLayer& layer, const KvProfile& profile)
      : layer_(layer), profile_(profile), exact_{&layer.sinks(), &layer.window()} {}

  Status prepare(StepScratch& scratch) override;
  int n_phase() const override { return static_cast<int>(phases().size()); }
  void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) override;
  void finish() override;
  std::optional<std::span<const int32_t>> last_selection(int64_t head_kv) const override;

 private:
  /// How a step reads the pages: those tokens that matter; all, out of hot keys; all, rebuilt and forgotten.
  enum class Way { no_pages, sparse, hot, streamed };
  enum class Phase { score, pool, select, attend, merge };

  std::span<const Phase> phases() const;
  void score(const DecodeStep& step, StepScratch& scratch, int ith, int n_threads);
  void select(KltWork& work, KltWork::Thread& thread);
  void choose(KltWork& work, const KltWork::Thread& thread, int64_t head_kv);
  void hold(KltWork& work, int64_t head_kv);
  void attend_slices(StepScratch::Thread& thread, int n_threads, KltWork& work, KltWork::Thread& mine);
  void attend_slice(StepScratch& scratch, int i, int ith);

  KltLayer& layer_;
  KvProfile profile_;
  ExactBlocks exact_;
  int64_t budget_ = 0;  ///< most tokens that a KV head reads from pages in this step
  Way way_ = Way::hot;
  std::vector<float> query_;        ///< [n_head, head_dim] of the running step, if the layer wants it
  std::vector<int32_t> positions_;  ///< [n_head_kv, budget_], those of the last step
  std::vector<int64_t> n_read_;     ///< [n_head_kv]: of positions_
};

}  // namespace narrows
