// The stages of a decode step that families share, one file each: select, attend. A family strings them and
// its own (score, rebuild) into phases.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>

#include "base/part.h"
#include "kv/step/step_scratch.h"
#include "kv/window/exact_store.h"
#include "narrows/config.h"

namespace narrows {

// --- select.cpp ---

/// Tokens in pages that a step reads, of n_in_pages, at a context of n_kv tokens.
int64_t count_selected(const KvProfile& profile, int64_t n_in_pages, int64_t n_kv);

/// selected [count], ascending: the best by scores [n]; all of them, without a look at the scores, if count
/// == n.
void select_tokens(const float* scores, int64_t n, int64_t count, int32_t* selected, void* work);

// --- attend.cpp ---

/// Rotates the query [n_head, head_dim] to position pos, scales it and keeps it in thread.q.
void rotate_query(const AttentionShape& shape, const kernels::RopeTable& rope, const float* q, int64_t pos,
                  StepScratch::Thread& thread);

/// Makes slice i the one that the thread adds up in, empty. Returns has_tokens; if not, only merge_heads()
/// may use the slice.
bool open_slice(const AttentionShape& shape, StepScratch& scratch, int i, bool has_tokens,
                StepScratch::Thread& thread);

/// Exact blocks of a layer in order: those of `first` from its token `unseen` on, then those of `second` (may
/// be null).
struct ExactBlocks {
  const ExactStore* first = nullptr;
  const ExactStore* second = nullptr;
  int64_t unseen = 0;
  int64_t n_skipped() const { return unseen / first->layout().block; }
  int64_t n_block() const { return first->n_block() - n_skipped() + (second ? second->n_block() : 0); }
};

/// Attends to exact blocks [blocks.begin, blocks.end), the running step's token included.
void attend_exact(const AttentionShape& shape, const ExactBlocks& exact, Part blocks,
                  StepScratch::Thread& thread);

/// The same for slices [slices.begin, slices.end) of kSlices equal parts of the blocks; part i adds up in
/// slice first_slice + i.
void attend_exact_slices(const AttentionShape& shape, const ExactBlocks& exact, StepScratch& scratch,
                         int first_slice, Part slices, StepScratch::Thread& thread);

/// What all phases of a step begin with: the last thread stores the new token, every thread rotates the query
/// and attends to its slices of the exact blocks, into slices first_slice ...
void begin_attention(KvLayer& layer, const ExactBlocks& exact, const DecodeStep& step, StepScratch& scratch,
                     int first_slice, int ith, int n_threads);

/// Attends to n tokens in float32: thread.key_t holds the keys of one KV head, v [n, D] all values.
void attend_tile(const AttentionShape& shape, int64_t head_kv, const float* v, int64_t n,
                 StepScratch::Thread& thread);

/// Merges slices [0, n_slices), and the step's sinks, for query heads [heads.begin, heads.end) in order and
/// writes them to step.out.
void merge_heads(const AttentionShape& shape, StepScratch& scratch, int n_slices, Part heads,
                 const DecodeStep& step);

/// A softmax's maximum with the sink of head h counted in, and what the sink adds to its sum then.
inline float with_sink(const DecodeStep& step, int64_t h, float top) {
  return step.sinks == nullptr ? top : std::fmax(top, step.sinks[h]);
}
inline float sum_of_sink(const DecodeStep& step, int64_t h, float top) {
  return step.sinks == nullptr ? 0.0F : std::exp(step.sinks[h] - top);
}

}  // namespace narrows
