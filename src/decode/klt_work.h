// What a step over klt layers works in, beside StepScratch: shared by all layers of a session.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "cache/klt_layer.h"
#include "decode/scratch.h"
#include "decode/stages.h"

namespace narrows {

/// Blocks of tokens whose queries are projected together: a multiple of the product's six rows, few enough
/// that they stay in the L1 cache.
inline constexpr int64_t kScoreChunk = 24;

struct KltWork {
  KltWork(const KltLayer& layer, const KvProfile& profile, int n_threads);
  bool ok() const;

  struct Thread {
    Thread(const KltLayer& layer, int64_t n_coef, int64_t ldu);
    bool ok() const;

    KltScratch tile;
    AlignedArray<float> folded;         ///< [n_coef, heads of a part x ldu]: queries folded with the basis
    AlignedArray<float> projected;      ///< [kScoreChunk, heads of a part x ldu]
    AlignedArray<float> step;           ///< [n_index]
    AlignedArray<uint8_t> codes;        ///< expanded index of a page
    AlignedArray<float> key;            ///< [kTile, head_dim] rebuilt
    AlignedArray<kernels::f16_t> half;  ///< [kTile, head_dim] the same, rotated
    AlignedArray<float> score;          ///< [group, kTile]
    AlignedArray<float> weight;         ///< [group]
    AlignedArray<float> cos;            ///< [kTile, head_dim / 2 at most]
    AlignedArray<float> sin;
    AlignedArray<float> latent;        ///< [width of a part] of merging
    AlignedArray<float> amplitude;     ///< [kTile, ld_latent]: of the values, a row a page of the tile
    AlignedArray<float> slice_weight;  ///< [n_head, 2 kSlices]: makes a slice's numbers probabilities
    std::vector<float> run_score;      ///< [group, ld_run], grown with the context
  };

  /// Softmax states of all query heads over one slice of the selected tokens, values as latents.
  struct Slice {
    Slice(int64_t n_head, int64_t ld_latent) : max(n_head), sum(n_head), latent(n_head * ld_latent) {}
    bool ok() const { return max.ok() && sum.ok() && latent.ok(); }
    AlignedArray<float> max;     ///< [n_head]
    AlignedArray<float> sum;     ///< [n_head]; 0: empty
    AlignedArray<float> latent;  ///< [n_head, ld_latent], not cleared while empty
  };

  int64_t ld_latent;
  int64_t ldu;     ///< of projected queries: n_index at most and the mean's column
  int64_t n_coef;  ///< cosines and sines of all pairs, and 1 if some coordinates are not rotated
  std::vector<double>
      damp;  ///< [n_rot / 2]: what averaging a pair over a block leaves of it, times magnitude
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Slice>> slices;

  // Grown with the context; ld is the room for tokens.
  int64_t ld = 0;
  int64_t ld_run = 0;                 ///< most tokens of a run
  std::vector<float> turns;           ///< [blocks, n_coef] damped cosines and sines of each block's centre
  std::vector<float> scores;          ///< [n_head, ld]
  std::vector<float> pooled;          ///< [n_head_kv, ld]: of candidates alone, slice by slice
  std::vector<int32_t> candidate;     ///< [n_head_kv, ld]: their tokens
  std::vector<int64_t> n_candidate;   ///< [n_head_kv, kSlices]
  std::vector<int32_t> selected;      ///< [n_head_kv, ld], ascending
  std::vector<int64_t> n_selected;    ///< [n_head_kv]
  std::vector<int32_t> slot;          ///< [n_head_kv, ld]: where the rebuilt keys of the selected are
  std::vector<int32_t> missing;       ///< [n_head_kv, ld]: which of the selected are to be rebuilt
  std::vector<int64_t> n_missing;     ///< [n_head_kv]
  std::vector<uint64_t> select_work;  ///< [n_head_kv, ..]
  int64_t ld_select = 0;
  std::vector<float> part_max;       ///< [n_head, 2 kSlices]: of pages, then of exact blocks
  std::vector<float> part_sum;       ///< [n_head, 2 kSlices]; 0: nothing there
  std::atomic<int64_t> next_run{0};  ///< of all heads' runs, the next one to be attended to

  /// Room for n tokens in pages of `layer`, of which n_read are read at most; throws std::bad_alloc.
  void grow(const KltLayer& layer, const KvProfile& profile, int64_t n, int64_t n_read);
};

// --- klt_score.cpp ---

/// Scores the pages of slices [slices.begin, slices.end) of kSlices for every query head: probabilities up to
/// a factor, of each slice alone, with its maximum and sum in part_max and part_sum. q [n_head, head_dim] is
/// rotated and scaled.
void klt_score(const KltLayer& layer, const KvProfile& profile, const float* q, Part slices, KltWork& work,
               KltWork::Thread& thread);

/// Takes the softmax states of exact blocks, slices kSlices + [slices.begin, slices.end) of scratch, into
/// part_max and part_sum.
void klt_note_exact(const AttentionShape& shape, Part slices, StepScratch& scratch, KltWork& work);

// --- klt_select.cpp ---

/// Candidates of every KV head in these slices: tokens whose probability, summed over the head's group, is
/// not so small that all like them together could not matter. Leaves thread.slice_weight for klt_select().
void klt_pool(const KltLayer& layer, const KvProfile& profile, Part slices, KltWork& work,
              KltWork::Thread& thread);

/// The tokens that a KV head reads, work.selected: the best `budget`, or fewer as soon as what is left out is
/// at most 1 - profile.mass of the attention, on average over the group. Exact: ties go to the older token.
void klt_select(const KltLayer& layer, const KvProfile& profile, int64_t budget, int64_t head_kv,
                KltWork& work, const KltWork::Thread& thread);

// --- klt_attend.cpp ---

/// Those of tokens [tokens.begin, tokens.end) of the pages that are no anchors, ascending; returns how many.
/// Anchors are read among the exact tokens.
int64_t klt_free_tokens(const KltLayer& layer, Part tokens, int32_t* free);

/// Runs of the selected tokens of a KV head, each a task with a slice of its own; at most kSlices.
int64_t klt_n_run(int64_t n_selected);
/// Rebuilds what is missing of the keys of run `run` of a KV head.
void klt_rebuild_run(KltLayer& layer, int64_t head_kv, int64_t run, KltWork& work, KltWork::Thread& thread);
/// Then attends to the run: sums its values as latents.
void klt_attend_run(KltLayer& layer, int64_t head_kv, int64_t run, const float* q, KltWork& work,
                    KltWork::Thread& thread);

/// Attends to the free ones of tokens [tokens.begin, tokens.end) for all KV heads, into a slice; nothing is
/// kept.
void klt_attend_all(const KltLayer& layer, Part tokens, const float* q, KltWork& work,
                    KltWork::Thread& thread, KltWork::Slice& slice);

/// Merges the latent slices and the exact slices kSlices .. of query heads [heads.begin, heads.end) into out.
void klt_merge(const KltLayer& layer, StepScratch& scratch, KltWork& work, KltWork::Thread& thread,
               Part heads, float* out);

}  // namespace narrows
