// A SALS step in the stages' order.
#include <new>

#include "kv/sals/sals_layer.h"
#include "kv/sals/sals_stages.h"

namespace narrows {

namespace {

/// Selected tokens are cut into slices in runs of this many: finer than a tile, so that threads end together.
constexpr int64_t kRun = 16;

/// All layers of a session are of one family.
SalsWork& sals_work(const StepScratch& scratch) { return static_cast<SalsWork&>(*scratch.work); }

}  // namespace

Status SalsLayer::begin_step(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(n_tokens() + 1);
  if (Status s = make_room_in_turn(scratch); !s.ok()) return s;
  const int64_t n = n_in_pages();
  n_selected_ = count_selected(profile_, n, n_tokens() + 1);
  sparse_ = !reads_all();
  try {
    const auto grow = [](auto& buffer, int64_t size) {
      if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
    };
    if (!scratch.work) scratch.work = std::make_unique<SalsWork>();
    SalsWork& work = sals_work(scratch);
    const int64_t room = n_page() * kPageTokens;  // whole pages: not every step grows them
    grow(work.selected, room);
    if (sparse_) {
      grow(work.scores, room);
      grow(work.select_work, ceil_div(kernels::select_scratch_bytes(room), int64_t{sizeof(uint64_t)}));
      positions_.resize(static_cast<size_t>(n_selected_));
    }
  } catch (const std::bad_alloc&) {
    return no_memory_for_tokens(n_tokens() + 1);
  }
  return {};
}

void SalsLayer::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  switch (phase) {
    case 0:
      if (ith == 0) store_step(step.k, step.v);
      if (!reads_all()) {
        scratch.thread(ith).clock.enter(AttentionStage::score);
        score_pages(*this, step.q, part_of(n_page(), ith, n_threads), scratch.thread(ith),
                    sals_work(scratch).scores.data());
      }
      break;
    case 1:
      scratch.thread(ith).clock.enter(AttentionStage::select);
      rotate_query(shape(), rope(), step.q, n_tokens(), scratch.thread(ith));
      if (ith == 0) {
        select_tokens(sals_work(scratch).scores.data(), n_in_pages(), n_selected_,
                      sals_work(scratch).selected.data(), sals_work(scratch).select_work.data());
      }
      // Selection runs on one thread; the others see to the exact tokens meanwhile.
      if (n_threads == 1) {
        attend_exact_slices(shape(), {&sinks(), &window()}, scratch, kSlices, {0, kSlices},
                            scratch.thread(0));
      } else if (ith > 0) {
        attend_exact_slices(shape(), {&sinks(), &window()}, scratch, kSlices,
                            part_of(kSlices, ith - 1, n_threads - 1), scratch.thread(ith));
      }
      break;
    case 2:
      scratch.thread(ith).clock.enter(AttentionStage::attend);
      attend_slices(scratch, part_of(kSlices, ith, n_threads), scratch.thread(ith));
      break;
    default:
      merge_heads(shape(), scratch, 2 * kSlices, part_of(shape().n_head, ith, n_threads), step);
      break;
  }
}

std::span<const int32_t> SalsLayer::slice_of_selected(const StepScratch& scratch, int64_t i) const {
  const Part runs = part_of(ceil_div(n_selected_, kRun), static_cast<int>(i), kSlices);
  const int64_t begin = runs.begin * kRun;
  const int64_t end = std::min(runs.end * kRun, n_selected_);
  return {sals_work(scratch).selected.data() + begin, static_cast<size_t>(std::max<int64_t>(0, end - begin))};
}

void SalsLayer::attend_slices(StepScratch& scratch, Part slices, StepScratch::Thread& thread) {
  for (int64_t i = slices.begin; i < slices.end; ++i) {
    const std::span<const int32_t> tokens = slice_of_selected(scratch, i);
    if (!open_slice(shape(), scratch, static_cast<int>(i), !tokens.empty(), thread)) continue;
    if (i + 1 < slices.end) prefetch_selected(*this, slice_of_selected(scratch, i + 1));
    attend_selected(*this, tokens, thread);
    if (!sparse_) continue;
    // Positions outlive this layer's turn with the scratch.
    int32_t* positions = positions_.data() + (tokens.data() - sals_work(scratch).selected.data());
    for (const int32_t token : tokens) *positions++ = static_cast<int32_t>(n_sink()) + token;
  }
}

std::optional<std::span<const int32_t>> SalsLayer::last_selection(int64_t /*head_kv*/) const {
  if (!sparse_) return std::nullopt;
  return std::span<const int32_t>(positions_);
}

}  // namespace narrows
