// A klt step in the stages' order.
#include <algorithm>
#include <new>
#include <thread>

#include "base/thread_pool.h"
#include "kv/klt/klt_layer.h"
#include "kv/klt/klt_work.h"

namespace narrows {

namespace {

/// Tokens that are all read are cut into slices in runs of this many, as for SALS.
constexpr int64_t kRun = 16;

/// All layers of a session are of one family.
KltWork& klt_work(StepScratch& scratch) { return static_cast<KltWork&>(*scratch.work); }

/// Looks at what another thread chooses before the core is offered to it.
constexpr int kSpins = 2000;

}  // namespace

Status KltLayer::begin_step(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(n_tokens() + 1);
  if (Status s = make_room_in_turn(scratch); !s.ok()) return s;
  const int64_t n = n_in_pages();
  // Anchors are read among the exact tokens, whatever the budget.
  const int64_t n_free = n - n_kept();
  budget_ = std::min(n_free, count_selected(profile_, n, n_tokens() + 1));
  const int64_t n_hot = klt_hot_tokens(profile_, n, n_tokens() + 1);
  way_ = n == 0 ? Way::no_pages : budget_ < n_free ? Way::sparse : n_free <= n_hot ? Way::hot : Way::streamed;
  try {
    if (!scratch.work) scratch.work = std::make_unique<KltWork>(scratch.n_threads());
    klt_work(scratch).fit(*this, profile_, n, way_ == Way::streamed ? 0 : budget_);
    query_.resize(static_cast<size_t>(wants_queries() ? shape().n_head * shape().head_dim : 0));
    if (way_ == Way::streamed) return {};
    for (int64_t h = 0; h < shape().n_head_kv; ++h) hot_keys(h).reserve(n_hot);
    positions_.resize(static_cast<size_t>(shape().n_head_kv * budget_));
    n_read_.resize(static_cast<size_t>(shape().n_head_kv));
  } catch (const std::bad_alloc&) {
    return no_memory_for_tokens(n_tokens() + 1);
  }
  return {};
}

std::span<const KltLayer::Phase> KltLayer::phases() const {
  static constexpr Phase kAll[] = {Phase::score, Phase::pool, Phase::select, Phase::attend, Phase::merge};
  static constexpr Phase kNoChoice[] = {Phase::score, Phase::select, Phase::attend, Phase::merge};
  static constexpr Phase kNoPages[] = {Phase::score, Phase::merge};
  if (way_ == Way::no_pages) return kNoPages;
  if (way_ == Way::sparse) return kAll;
  return kNoChoice;
}

void KltLayer::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  const AttentionShape& shape = this->shape();
  StepScratch::Thread& thread = scratch.thread(ith);
  KltWork& work = klt_work(scratch);
  KltThread& mine = *work.threads[static_cast<size_t>(ith)];
  const Part slices = part_of(kSlices, ith, n_threads);
  switch (phases()[static_cast<size_t>(phase)]) {
    case Phase::score:
      score(step, scratch, ith, n_threads);
      break;
    case Phase::pool:
      thread.clock.enter(AttentionStage::select);
      klt_pool(*this, profile_, slices, work, mine);
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
      klt_merge(*this, scratch, work, mine, part_of(shape.n_head, ith, n_threads), step);
      break;
  }
}

void KltLayer::score(const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  const AttentionShape& shape = this->shape();
  StepScratch::Thread& thread = scratch.thread(ith);
  KltWork& work = klt_work(scratch);
  const Part slices = part_of(kSlices, ith, n_threads);
  if (ith == 0) {
    // Until the end of the step: other layers' queries take its place by then.
    std::copy_n(step.q, query_.size(), query_.data());
    work.next_choice = 0;
    work.next_slice = 0;
    for (std::atomic<bool>& chosen : work.chosen) chosen = false;
  }
  begin_attention(*this, {&sinks(), &window()}, step, scratch, kSlices, ith, n_threads);
  if (way_ != Way::sparse || slices.begin == slices.end) return;
  thread.clock.enter(AttentionStage::score);
  klt_note_exact(shape, slices, scratch, work);
  klt_score(*this, profile_, thread.q.data(), slices, work, *work.threads[static_cast<size_t>(ith)]);
}

// A task a KV head chooses its tokens, and one gives them their rows of hot keys: apart, so that threads of
// which there are fewer than heads share the work more evenly. Tasks are taken in order, so whoever waits
// waits for a task that runs.
void KltLayer::select(KltWork& work, KltThread& thread) {
  const int64_t n_head_kv = shape().n_head_kv;
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

void KltLayer::choose(KltWork& work, const KltThread& thread, int64_t head_kv) {
  const int64_t group = shape().group();
  for (const auto& slice : work.slices) std::fill_n(slice->sum.data() + head_kv * group, group, 0.0F);
  if (way_ == Way::sparse) {
    klt_select(*this, profile_, budget_, head_kv, work, thread);
  } else if (way_ == Way::hot) {
    work.n_selected[static_cast<size_t>(head_kv)] =
        klt_free_tokens(*this, {0, n_in_pages()}, work.selected.data() + head_kv * work.ld);
  }
}

void KltLayer::hold(KltWork& work, int64_t head_kv) {
  if (way_ == Way::streamed) return;
  const auto at = static_cast<size_t>(head_kv);
  const int64_t n = work.n_selected[at];
  const int32_t* selected = work.selected.data() + head_kv * work.ld;
  work.n_missing[at] =
      hot_keys(head_kv).hold({selected, static_cast<size_t>(n)}, work.slot.data() + head_kv * work.ld,
                             work.missing.data() + head_kv * work.ld);
  // Positions outlive this layer's turn with the scratch.
  n_read_[at] = n;
  int32_t* positions = positions_.data() + head_kv * budget_;
  for (int64_t i = 0; i < n; ++i) positions[i] = static_cast<int32_t>(n_sink()) + selected[i];
}

// While a thread works on a slice, the rows of the one that will probably be its next are on their way.
void KltLayer::attend_slices(StepScratch::Thread& thread, int n_threads, KltWork& work, KltThread& mine) {
  thread.clock.enter(AttentionStage::rebuild);
  klt_cut_slices(*this, work, mine);
  bool asked = false;
  for (int slice = kAttendSlices - 1 - work.next_slice++; slice >= 0;
       slice = kAttendSlices - 1 - work.next_slice++) {
    thread.clock.enter(AttentionStage::rebuild);
    if (!asked) klt_prefetch_slice(*this, slice, work, mine);
    asked = slice >= n_threads;
    if (asked) klt_prefetch_slice(*this, slice - n_threads, work, mine);
    klt_rebuild_slice(*this, slice, work, mine);
    thread.clock.enter(AttentionStage::attend);
    klt_attend_slice(*this, slice, thread.q.data(), work, mine);
  }
}

void KltLayer::attend_slice(StepScratch& scratch, int i, int ith) {
  KltWork& work = klt_work(scratch);
  const int64_t n = n_in_pages();
  const Part runs = part_of(ceil_div(n, kRun), i, kAttendSlices);
  const Part tokens = {runs.begin * kRun, std::min(runs.end * kRun, n)};
  klt_attend_all(*this, tokens, scratch.thread(ith).q.data(), work, *work.threads[static_cast<size_t>(ith)],
                 i);
}

void KltLayer::end_step() {
  count_step();
  if (!wants_queries() || query_.empty()) return;
  try {
    observe_queries(query_.data(), 1);
  } catch (const std::bad_alloc&) {
    // The statistics go without this query.
  }
}

std::optional<std::span<const int32_t>> KltLayer::last_selection(int64_t head_kv) const {
  if (way_ != Way::sparse) return std::nullopt;
  return std::span<const int32_t>(positions_.data() + head_kv * budget_,
                                  static_cast<size_t>(n_read_[static_cast<size_t>(head_kv)]));
}

bool KltLayer::always_reads(int64_t pos) const {
  if (WindowedLayer::always_reads(pos)) return true;
  const int64_t token = pos - n_sink();
  return (anchors(token / kPageTokens) >> token % kPageTokens & 1) != 0;
}

}  // namespace narrows
