// A klt step in the stages' order.
#include <algorithm>
#include <new>

#include "decode/decoders.h"
#include "decode/klt_work.h"

namespace narrows {

namespace {

/// Selected tokens are cut into slices in runs of this many, as for SALS.
constexpr int64_t kRun = 16;

}  // namespace

Status KltDecoder::prepare(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(layer_.n_tokens() + 1);
  if (Status s = layer_.prepare_step(); !s.ok()) return s;
  const int64_t n = layer_.n_in_pages();
  n_selected_ = count_selected(profile_, n, layer_.n_tokens() + 1);
  sparse_ = n_selected_ < n;
  try {
    if (!scratch.klt) {
      scratch.klt = std::make_unique<KltWork>(layer_, profile_, scratch.n_threads());
      if (!scratch.klt->ok()) {
        scratch.klt.reset();
        throw std::bad_alloc();
      }
    }
    scratch.klt->grow(layer_.shape(), n);
    if (sparse_) positions_.resize(static_cast<size_t>(layer_.shape().n_head_kv * n_selected_));
  } catch (const std::bad_alloc&) {
    return no_memory_for_tokens(layer_.n_tokens() + 1);
  }
  return {};
}

void KltDecoder::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  const AttentionShape& shape = layer_.shape();
  StepScratch::Thread& thread = scratch.thread(ith);
  KltWork& work = *scratch.klt;
  KltWork::Thread& mine = *work.threads[static_cast<size_t>(ith)];
  const Part slices = part_of(kSlices, ith, n_threads);
  switch (phase) {
    case 0:
      // The newest block always falls to the last slice, and that to the last thread.
      if (ith == n_threads - 1) layer_.store_step(step.k, step.v);
      if (ith == 0) query_ = step.q;
      rotate_query(shape, layer_.rope(), step.q, layer_.n_tokens(), thread);
      attend_exact_slices(shape, exact_, scratch, kSlices, slices, thread);
      if (!sparse_) break;
      for (int64_t i = slices.begin; i < slices.end; ++i) {
        klt_score_part(layer_, profile_, thread.q.data(), static_cast<int>(i),
                       part_of(layer_.n_page(), static_cast<int>(i), kSlices), work, mine);
      }
      break;
    case 1: {
      const Part heads = part_of(shape.n_head_kv, ith, n_threads);
      for (int64_t h = heads.begin; h < heads.end; ++h) select(scratch, h);
      break;
    }
    case 2:
      for (int64_t i = slices.begin; i < slices.end; ++i) attend_slice(scratch, static_cast<int>(i), ith);
      break;
    default:
      klt_merge(layer_, scratch, work, mine, part_of(shape.n_head, ith, n_threads), step.out);
      break;
  }
}

void KltDecoder::select(StepScratch& scratch, int64_t head_kv) {
  KltWork& work = *scratch.klt;
  const int64_t n = layer_.n_in_pages();
  int32_t* selected = work.selected.data() + head_kv * work.ld;
  if (sparse_) klt_pool(layer_, head_kv, layer_.n_page(), scratch, work);
  select_tokens(work.pooled.data() + head_kv * work.ld, n, n_selected_, selected,
                work.select_work.data() + head_kv * work.ld_select);
  if (!sparse_) return;
  // Positions outlive this layer's turn with the scratch.
  int32_t* positions = positions_.data() + head_kv * n_selected_;
  for (int64_t i = 0; i < n_selected_; ++i)
    positions[i] = static_cast<int32_t>(layer_.n_sink()) + selected[i];
}

void KltDecoder::attend_slice(StepScratch& scratch, int i, int ith) {
  KltWork& work = *scratch.klt;
  const AttentionShape& shape = layer_.shape();
  KltWork::Slice& slice = *work.slices[static_cast<size_t>(i)];
  std::fill_n(slice.sum.data(), shape.n_head, 0.0F);
  const Part runs = part_of(ceil_div(n_selected_, kRun), i, kSlices);
  const int64_t begin = runs.begin * kRun;
  const int64_t end = std::min(runs.end * kRun, n_selected_);
  if (begin >= end) return;
  KltWork::Thread& mine = *work.threads[static_cast<size_t>(ith)];
  const float* q = scratch.thread(ith).q.data();
  const auto tokens = [&](int64_t head_kv) {
    return std::span<const int32_t>(work.selected.data() + head_kv * work.ld + begin,
                                    static_cast<size_t>(end - begin));
  };
  if (!sparse_) {  // all heads read the same tokens: their latents are read once
    klt_attend(layer_, tokens(0), {0, shape.n_head_kv}, q, work, mine, slice);
    return;
  }
  for (int64_t h = 0; h < shape.n_head_kv; ++h)
    klt_attend(layer_, tokens(h), {h, h + 1}, q, work, mine, slice);
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
  if (!sparse_) return std::nullopt;
  return std::span<const int32_t>(positions_.data() + head_kv * n_selected_,
                                  static_cast<size_t>(n_selected_));
}

}  // namespace narrows
