// F16Layer over one ExactStore, and its step.
#include "kv/f16/f16_layer.h"

#include <new>

#include "kv/step/stages.h"

namespace narrows {

Status F16Layer::append(const float* k, const float* v, int64_t n) {
  if (Status s = check_tokens(shape(), rope(), n_tokens(), k, v, n); !s.ok()) return s;
  store_.expect_nothing();
  if (!store_.reserve(n)) return no_memory_for_tokens(n_tokens() + n);
  store_.push(n_tokens(), k, v, n);
  return {};
}

Status F16Layer::make_room(bool /*may_convert*/) {
  if (!step_is_finite_) return non_finite_token(n_tokens() - 1);
  if (!store_.expect_step()) return no_memory_for_tokens(n_tokens() + 1);
  return {};
}

void F16Layer::keep(int64_t n) {
  store_.expect_nothing();
  store_.truncate(n);
  step_is_finite_ = true;
}

Status F16Layer::share(const KvLayer& from, int64_t n) {
  try {
    store_.share(static_cast<const F16Layer&>(from).store_, n);
    step_is_finite_ = true;
    return {};
  } catch (const std::bad_alloc&) {
    clear();
    return no_memory_for_tokens(n);
  }
}

Status F16Layer::load(SnapshotReader& in) {
  clear();
  if (store_.load(in, rope().n_ctx())) return {};
  return not_a_layer(in);
}

void F16Layer::clear() {
  store_.clear();
  step_is_finite_ = true;
}

Status F16Layer::begin_step(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(n_tokens() + 1);
  return make_room(false);
}

void F16Layer::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  scratch.thread(ith).clock.enter(AttentionStage::attend);
  if (phase == 0) {
    begin_attention(*this, {&store_, nullptr}, step, scratch, 0, ith, n_threads);
  } else {
    merge_heads(shape(), scratch, kSlices, part_of(shape().n_head, ith, n_threads), step);
  }
}

}  // namespace narrows
