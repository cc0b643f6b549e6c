// A step over all tokens: exact blocks as they are, KIVI pages dequantised a tile at a time.
#include "decode/decoders.h"

namespace narrows {

Status DenseDecoder::prepare(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(cache_.n_tokens() + 1);
  return cache_.prepare_step();
}

void DenseDecoder::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith,
                             int n_threads) {
  const AttentionShape& shape = cache_.shape();
  scratch.thread(ith).clock.enter(AttentionStage::attend);
  if (phase == 0) {
    // The newest block always falls to the last slice (part_of rounds down), and that to the last thread:
    // nobody else reads where it writes.
    if (ith == n_threads - 1) cache_.store_step(step.k, step.v);
    rotate_query(shape, cache_.rope(), step.q, cache_.n_tokens(), scratch.thread(ith));
    const Part slices = part_of(kSlices, ith, n_threads);
    attend_exact_slices(shape, exact_, scratch, 0, slices, scratch.thread(ith));
    if (kivi_) attend_pages(scratch, slices, scratch.thread(ith));
  } else {
    merge_heads(shape, scratch, kivi_ ? 2 * kSlices : kSlices, part_of(shape.n_head, ith, n_threads),
                step.out);
  }
}

void DenseDecoder::attend_pages(StepScratch& scratch, Part slices, StepScratch::Thread& thread) {
  const AttentionShape& shape = cache_.shape();
  for (int64_t i = slices.begin; i < slices.end; ++i) {
    const Part pages = part_of(kivi_->n_page(), static_cast<int>(i), kSlices);
    if (!open_slice(shape, scratch, kSlices + static_cast<int>(i), pages.begin < pages.end, thread)) continue;
    for (int64_t p = pages.begin; p < pages.end; ++p) {
      const int64_t n = kivi_->page_tokens(p);
      kivi_->read_values(p, 0, n, thread.value.data());
      for (int64_t h = 0; h < shape.n_head_kv; ++h) {
        kivi_->read_keys(p, h, thread.key_t.data());
        attend_tile(shape, h, thread.value.data(), n, thread);
      }
    }
  }
}

}  // namespace narrows
