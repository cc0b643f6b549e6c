// A klt step in the stages' order.
#include <algorithm>
#include <new>

#include "decode/decoders.h"
#include "decode/klt_work.h"

namespace narrows {

namespace {

/// Tokens that are all read are cut into slices in runs of this many, as for SALS.
constexpr int64_t kRun = 16;

}  // namespace

Status KltDecoder::prepare(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(layer_.n_tokens() + 1);
  if (Status s = layer_.prepare_step(); !s.ok()) return s;
  const int64_t n = layer_.n_in_pages();
  // Anchors are read among the exact tokens, whatever the budget.
  const int64_t n_free = n - layer_.n_kept();
  budget_ = std::min(n_free, count_selected(profile_, n, layer_.n_tokens() + 1));
  const int64_t n_hot = klt_hot_tokens(profile_, n, layer_.n_tokens() + 1);
  way_ = n == 0 ? Way::no_pages : budget_ < n_free ? Way::sparse : n_free <= n_hot ? Way::hot : Way::streamed;
  try {
    if (!scratch.klt) {
      scratch.klt = std::make_unique<KltWork>(layer_, profile_, scratch.n_threads());
      if (!scratch.klt->ok()) {
        scratch.klt.reset();
        throw std::bad_alloc();
      }
    }
    scratch.klt->grow(layer_, profile_, n, way_ == Way::streamed ? 0 : budget_);
    if (way_ == Way::streamed) return {};
    for (int64_t h = 0; h < layer_.shape().n_head_kv; ++h) layer_.hot_keys(h).reserve(n_hot);
    positions_.resize(static_cast<size_t>(layer_.shape().n_head_kv * budget_));
    n_read_.resize(static_cast<size_t>(layer_.shape().n_head_kv));
  } catch (const std::bad_alloc&) {
    return no_memory_for_tokens(layer_.n_tokens() + 1);
  }
  return {};
}

std::span<const KltDecoder::Phase> KltDecoder::phases() const {
  static constexpr Phase kAll[] = {Phase::score, Phase::pool, Phase::select, Phase::attend, Phase::merge};
  static constexpr Phase kNoChoice[] = {Phase::score, Phase::select, Phase::attend, Phase::merge};
  static constexpr Phase kNoPages[] = {Phase::score, Phase::merge};
  if (way_ == Way::no_pages) return kNoPages;
  if (way_ == Way::sparse) return kAll;
  return kNoChoice;
}

void KltDecoder::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  const AttentionShape& shape = layer_.shape();
  StepScratch::Thread& thread = scratch.thread(ith);
  KltWork& work = *scratch.klt;
  KltWork::Thread& mine = *work.threads[static_cast<size_t>(ith)];
  const Part slices = part_of(kSlices, ith, n_threads);
  switch (phases()[static_cast<size_t>(phase)]) {
    case Phase::score:
      score(step, scratch, ith, n_threads);
      break;
    case Phase::pool:
      thread.clock.enter(AttentionStage::select);
      klt_pool(layer_, profile_, slices, work, mine);
      break;
    case Phase::select: {
      thread.clock.enter(AttentionStage::select);
      const Part heads = part_of(shape.n_head_kv, ith, n_threads);
      for (int64_t h = heads.begin; h < heads.end; ++h) select(work, mine, h);
      break;
    }
    case Phase::attend:
      thread.clock.enter(AttentionStage::attend);
      if (way_ == Way::streamed) {
        for (int64_t i = slices.begin; i < slices.end; ++i) attend_slice(scratch, static_cast<int>(i), ith);
      } else {
        attend_runs(thread, work, mine);
      }
      break;
    case Phase::merge:
      klt_merge(layer_, scratch, work, mine, part_of(shape.n_head, ith, n_threads), step.out);
      break;
  }
}

void KltDecoder::score(const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  const AttentionShape& shape = layer_.shape();
  StepScratch::Thread& thread = scratch.thread(ith);
  KltWork& work = *scratch.klt;
  const Part slices = part_of(kSlices, ith, n_threads);
  // The newest block always falls to the last slice, and that to the last thread.
  if (ith == n_threads - 1) layer_.store_step(step.k, step.v);
  if (ith == 0) {
    query_ = step.q;
    work.next_run = 0;
  }
  rotate_query(shape, layer_.rope(), step.q, layer_.n_tokens(), thread);
  attend_exact_slices(shape, exact_, scratch, kSlices, slices, thread);
  if (way_ != Way::sparse || slices.begin == slices.end) return;
  thread.clock.enter(AttentionStage::score);
  klt_note_exact(shape, slices, scratch, work);
  klt_score(layer_, profile_, thread.q.data(), slices, work, *work.threads[static_cast<size_t>(ith)]);
}

void KltDecoder::select(KltWork& work, KltWork::Thread& thread, int64_t head_kv) {
  const int64_t group = layer_.shape().group();
  for (const auto& slice : work.slices) std::fill_n(slice->sum.data() + head_kv * group, group, 0.0F);
  if (way_ == Way::streamed) return;
  int32_t* selected = work.selected.data() + head_kv * work.ld;
  const auto at = static_cast<size_t>(head_kv);
  int64_t& n = work.n_selected[at];
  if (way_ == Way::sparse) {
    klt_select(layer_, profile_, budget_, head_kv, work, thread);
  } else {
    n = klt_free_tokens(layer_, {0, layer_.n_in_pages()}, selected);
  }
  work.n_missing[at] =
      layer_.hot_keys(head_kv).hold({selected, static_cast<size_t>(n)}, work.slot.data() + head_kv * work.ld,
                                    work.missing.data() + head_kv * work.ld);
  // Positions outlive this layer's turn with the scratch.
  n_read_[at] = n;
  int32_t* positions = positions_.data() + head_kv * budget_;
  for (int64_t i = 0; i < n; ++i) positions[i] = static_cast<int32_t>(layer_.n_sink()) + selected[i];
}

void KltDecoder::attend_runs(StepScratch::Thread& thread, KltWork& work, KltWork::Thread& mine) {
  const int64_t n_head_kv = layer_.shape().n_head_kv;
  int64_t total = 0;
  for (int64_t h = 0; h < n_head_kv; ++h) total += klt_n_run(work.n_selected[static_cast<size_t>(h)]);
  for (int64_t i = work.next_run.fetch_add(1); i < total; i = work.next_run.fetch_add(1)) {
    int64_t run = i;
    int64_t h = 0;
    for (; run >= klt_n_run(work.n_selected[static_cast<size_t>(h)]); ++h)
      run -= klt_n_run(work.n_selected[static_cast<size_t>(h)]);
    thread.clock.enter(AttentionStage::rebuild);
    klt_rebuild_run(layer_, h, run, work, mine);
    thread.clock.enter(AttentionStage::attend);
    klt_attend_run(layer_, h, run, thread.q.data(), work, mine);
  }
}

void KltDecoder::attend_slice(StepScratch& scratch, int i, int ith) {
  KltWork& work = *scratch.klt;
  const int64_t n = layer_.n_in_pages();
  const Part runs = part_of(ceil_div(n, kRun), i, kSlices);
  const Part tokens = {runs.begin * kRun, std::min(runs.end * kRun, n)};
  klt_attend_all(layer_, tokens, scratch.thread(ith).q.data(), work, *work.threads[static_cast<size_t>(ith)],
                 *work.slices[static_cast<size_t>(i)]);
}

void KltDecoder::finish() {
  layer_.finish_step();
  if (!layer_.wants_queries()) return;
  try {
    layer_.observe_queries(query_, 1);
  } catch (const std::bad_alloc&) {
    // The statistics go without this query.
  }
}

std::optional<std::span<const int32_t>> KltDecoder::last_selection(int64_t head_kv) const {
  if (way_ != Way::sparse) return std::nullopt;
  return std::span<const int32_t>(positions_.data() + head_kv * budget_,
                                  static_cast<size_t>(n_read_[static_cast<size_t>(head_kv)]));
}

}  // namespace narrows
