// The stages of a decode step, one file each: score -> select -> rebuild -> attend. A decoder strings them
// into phases; another codec brings its own score and rebuild and keeps select and attend.
#pragma once

#include <cstdint>
#include <span>

#include "base/part.h"
#include "cache/exact_store.h"
#include "cache/sals_layer.h"
#include "decode/layer_decoder.h"
#include "decode/scratch.h"

namespace narrows {

// --- score.cpp ---

/// One score a token for all heads, without rotation (SALS 1.2, step 5 and 6): s_j = (sum of the query heads
/// of each KV head) U_r* . z_j. Writes scores [tokens of pages [pages.begin, pages.end)] at their index.
/// Always finite.
void score_pages(const SalsLayer& layer, const float* q, Part pages, StepScratch::Thread& thread,
                 float* scores);

// --- select.cpp ---

/// Tokens in pages that a step reads, of n_in_pages, at a context of n_kv tokens.
int64_t count_selected(const KvProfile& profile, int64_t n_in_pages, int64_t n_kv);

/// selected [count], ascending: the best by scores [n]; all of them, without a look at the scores, if count
/// == n.
void select_tokens(const float* scores, int64_t n, int64_t count, int32_t* selected, void* work);

// --- rebuild.cpp ---

/// Attends to selected tokens of the pages: latents -> keys -> RoPE, codes -> values, a tile at a time.
void attend_selected(const SalsLayer& layer, std::span<const int32_t> selected, StepScratch::Thread& thread);

/// Asks for what the first tile of attend_selected() will read: selected tokens lie scattered over a cache
/// that is larger than the CPU's.
void prefetch_selected(const SalsLayer& layer, std::span<const int32_t> selected);

// --- attend.cpp ---

/// Rotates the query [n_head, head_dim] to position pos, scales it and keeps it in thread.q.
void rotate_query(const AttentionShape& shape, const kernels::RopeTable& rope, const float* q, int64_t pos,
                  StepScratch::Thread& thread);

/// Makes slice i the one that the thread adds up in, empty. Returns has_tokens; if not, only merge_heads()
/// may use the slice.
bool open_slice(const AttentionShape& shape, StepScratch& scratch, int i, bool has_tokens,
                StepScratch::Thread& thread);

/// Exact blocks of a layer in order: those of `first`, then those of `second` (may be null).
struct ExactBlocks {
  const ExactStore* first = nullptr;
  const ExactStore* second = nullptr;
  int64_t n_block() const { return first->n_block() + (second ? second->n_block() : 0); }
};

/// Attends to exact blocks [blocks.begin, blocks.end), the running step's token included.
void attend_exact(const AttentionShape& shape, const ExactBlocks& exact, Part blocks,
                  StepScratch::Thread& thread);

/// The same for slices [slices.begin, slices.end) of kSlices equal parts of the blocks; part i adds up in
/// slice first_slice + i.
void attend_exact_slices(const AttentionShape& shape, const ExactBlocks& exact, StepScratch& scratch,
                         int first_slice, Part slices, StepScratch::Thread& thread);

/// Attends to n tokens in float32: thread.key_t holds the keys of one KV head, v [n, D] all values.
void attend_tile(const AttentionShape& shape, int64_t head_kv, const float* v, int64_t n,
                 StepScratch::Thread& thread);

/// Merges slices [0, n_slices) for query heads [heads.begin, heads.end) in order and writes them to out
/// [n_head, head_dim].
void merge_heads(const AttentionShape& shape, StepScratch& scratch, int n_slices, Part heads, float* out);

}  // namespace narrows
