// A klt step in the stages' order.
#include <algorithm>
#include <new>
#include <thread>

#include "base/thread_pool.h"
#include "decode/decoders.h"
#include "decode/klt_work.h"

namespace narrows {

namespace {

/// Tokens that are all read are cut into slices in runs of this many, as for SALS.
constexpr int64_t kRun = 16;

/// Looks at what another thread chooses before the core is offered to it.
constexpr int kSpins = 2000;

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
    query_.resize(
        static_cast<size_t>(layer_.wants_queries() ? layer_.shape().n_head * layer_.shape().head_dim : 0));
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
    case Phase::select:
      thread.clock.enter(AttentionStage::select);
      select(work, mine);
      break;
    case Phase::attend:
      thread.clock.enter(AttentionStage::attend);
      if (way_ == Way::streamed) {
        const Part own = part_of(kAttendSlices, ith, n_threads);
        for (int64_t i = own.begin; i < own.end; ++i) attend_slice(scratch, static_cast<int>(i), ith);
      } else {
        attend_slices(thread, n_threads, work, mine);
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
    // Until the end of the step: other layers' queries take its place by then.
    std::copy_n(step.q, query_.size(), query_.data());
    work.next_choice = 0;
    work.next_slice = 0;
    for (std::atomic<bool>& chosen : work.chosen) chosen = false;
  }
  rotate_query(shape, layer_.rope(), step.q, layer_.n_tokens(), thread);
  attend_exact_slices(shape, exact_, scratch, kSlices, slices, thread);
  if (way_ != Way::sparse || slices.begin == slices.end) return;
  thread.clock.enter(AttentionStage::score);
  klt_note_exact(shape, slices, scratch, work);
  klt_score(layer_, profile_, thread.q.data(), slices, work, *work.threads[static_cast<size_t>(ith)]);
}

// A task a KV head chooses its tokens, and one gives them their rows of hot keys: apart, so that threads of
// which there are fewer than heads share the work more evenly. Tasks are taken in order, so whoever waits
// waits for a task that runs.
void KltDecoder::select(KltWork& work, KltWork::Thread& thread) {
  const int64_t n_head_kv = layer_.shape().n_head_kv;
  for (int64_t i = work.next_choice++; i < 2 * n_head_kv; i = work.next_choice++) {
    std::atomic<bool>& chosen = work.chosen[static_cast<size_t>(i % n_head_kv)];
    if (i < n_head_kv) {
      choose(work, thread, i);
      chosen.store(true, std::memory_order_release);
    } else {
      for (int spin = 0; !chosen.load(std::memory_order_acquire); ++spin) {
        if (spin < kSpins) {
          ThreadPool::pause();
        } else {
          std::this_thread::yield();  // more threads than cores: the one that chooses may have none
        }
      }
      hold(work, i - n_head_kv);
    }
  }
}

void KltDecoder::choose(KltWork& work, const KltWork::Thread& thread, int64_t head_kv) {
  const int64_t group = layer_.shape().group();
  for (const auto& slice : work.slices) std::fill_n(slice->sum.data() + head_kv * group, group, 0.0F);
  if (way_ == Way::sparse) {
    klt_select(layer_, profile_, budget_, head_kv, work, thread);
  } else if (way_ == Way::hot) {
    work.n_selected[static_cast<size_t>(head_kv)] =
        klt_free_tokens(layer_, {0, layer_.n_in_pages()}, work.selected.data() + head_kv * work.ld);
  }
}

void KltDecoder::hold(KltWork& work, int64_t head_kv) {
  if (way_ == Way::streamed) return;
  const auto at = static_cast<size_t>(head_kv);
  const int64_t n = work.n_selected[at];
  const int32_t* selected = work.selected.data() + head_kv * work.ld;
  work.n_missing[at] =
      layer_.hot_keys(head_kv).hold({selected, static_cast<size_t>(n)}, work.slot.data() + head_kv * work.ld,
                                    work.missing.data() + head_kv * work.ld);
  // Positions outlive this layer's turn with the scratch.
  n_read_[at] = n;
  int32_t* positions = positions_.data() + head_kv * budget_;
  for (int64_t i = 0; i < n; ++i) positions[i] = static_cast<int32_t>(layer_.n_sink()) + selected[i];
}

// While a thread works on a slice, the rows of the one that will probably be its next are on their way.
void KltDecoder::attend_slices(StepScratch::Thread& thread, int n_threads, KltWork& work,
                               KltWork::Thread& mine) {
  thread.clock.enter(AttentionStage::rebuild);
  klt_cut_slices(layer_, work, mine);
  bool asked = false;
  for (int slice = kAttendSlices - 1 - work.next_slice++; slice >= 0;
       slice = kAttendSlices - 1 - work.next_slice++) {
    thread.clock.enter(AttentionStage::rebuild);
    if (!asked) klt_prefetch_slice(layer_, slice, work, mine);
    asked = slice >= n_threads;
    if (asked) klt_prefetch_slice(layer_, slice - n_threads, work, mine);
    klt_rebuild_slice(layer_, slice, work, mine);
    thread.clock.enter(AttentionStage::attend);
    klt_attend_slice(layer_, slice, thread.q.data(), work, mine);
  }
}

void KltDecoder::attend_slice(StepScratch& scratch, int i, int ith) {
  KltWork& work = *scratch.klt;
  const int64_t n = layer_.n_in_pages();
  const Part runs = part_of(ceil_div(n, kRun), i, kAttendSlices);
  const Part tokens = {runs.begin * kRun, std::min(runs.end * kRun, n)};
  klt_attend_all(layer_, tokens, scratch.thread(ith).q.data(), work, *work.threads[static_cast<size_t>(ith)],
                 i);
}

void KltDecoder::finish() {
  layer_.finish_step();
  if (!layer_.wants_queries() || query_.empty()) return;
  try {
    layer_.observe_queries(query_.data(), 1);
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
