// A step over all tokens: exact blocks as they are, pages dequantised a tile at a time.
#include "kv/kivi/kivi_layer.h"
#include "kv/step/stages.h"

namespace narrows {

Status KiviLayer::begin_step(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(n_tokens() + 1);
  return make_room(false);
}

void KiviLayer::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  StepScratch::Thread& thread = scratch.thread(ith);
  thread.clock.enter(AttentionStage::attend);
  if (phase == 0) {
    begin_attention(*this, {&sinks(), &window()}, step, scratch, 0, ith, n_threads);
    attend_pages(scratch, part_of(kSlices, ith, n_threads), thread);
  } else {
    merge_heads(shape(), scratch, 2 * kSlices, part_of(shape().n_head, ith, n_threads), step);
  }
}

void KiviLayer::attend_pages(StepScratch& scratch, Part slices, StepScratch::Thread& thread) const {
  for (int64_t i = slices.begin; i < slices.end; ++i) {
    const Part pages = part_of(n_page(), static_cast<int>(i), kSlices);
    const int slice = kSlices + static_cast<int>(i);
    if (!open_slice(shape(), scratch, slice, pages.begin < pages.end, thread)) continue;
    for (int64_t p = pages.begin; p < pages.end; ++p) {
      const int64_t n = page_tokens(p);
      read_values(p, 0, n, thread.value.data());
      for (int64_t h = 0; h < shape().n_head_kv; ++h) {
        read_keys(p, h, thread.key_t.data());
        attend_tile(shape(), h, thread.value.data(), n, thread);
      }
    }
  }
}

}  // namespace narrows
