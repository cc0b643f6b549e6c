// A step over all tokens: exact blocks as they are, KIVI pages dequantised a tile at a time.
#include "decode/decoders.h"

namespace narrows {

Status DenseDecoder::prepare(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(cache_.n_tokens() + 1);
  return cache_.prepare_step();
}

void DenseDecoder::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith,
                             int n_threads) {
  if (phase == 0) {
    // The newest block always falls to the last thread (part_of rounds down), so nobody else reads where it
    // writes.
    if (ith == n_threads - 1) cache_.store_step(step.k, step.v);
    attend(step, scratch.thread(ith), ith, n_threads);
  } else {
    merge_heads(cache_.shape(), scratch, part_of(cache_.shape().n_head, ith, n_threads), n_threads, step.out);
  }
}

void DenseDecoder::attend(const DecodeStep& step, StepScratch::Thread& thread, int ith, int n_threads) {
  const AttentionShape& shape = cache_.shape();
  begin_attention(shape, cache_.rope(), step.q, cache_.n_tokens(), thread);
  if (!kivi_) {
    attend_exact(shape, exact_, part_of(exact_.n_block(), ith, n_threads), thread);
    return;
  }
  // Pages and exact blocks are shared out apart: a page costs many times a block.
  const Part pages = part_of(kivi_->n_page(), ith, n_threads);
  for (int64_t p = pages.begin; p < pages.end; ++p) {
    const int64_t n = kivi_->page_tokens(p);
    kivi_->read_values(p, 0, n, thread.value.data());
    for (int64_t h = 0; h < shape.n_head_kv; ++h) {
      kivi_->read_keys(p, h, thread.key_t.data());
      attend_tile(shape, h, thread.value.data(), n, thread);
    }
  }
  attend_exact(shape, exact_, part_of(exact_.n_block(), ith, n_threads), thread);
}

}  // namespace narrows
