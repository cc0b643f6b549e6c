// What a step over klt layers works in, and its stages.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "kv/klt/klt_layer.h"
#include "kv/step/stages.h"
#include "kv/step/step_scratch.h"

namespace narrows {

/// Blocks of tokens whose queries are projected together: a multiple of the product's six rows, few enough
/// that they stay in the L1 cache.
inline constexpr int64_t kScoreChunk = 24;

/// Slices of the pages when tokens are attended to, of about as many selected tokens each; so many that a
/// thread that has none left waits shortly, and so few that their states, merged in order, cost little.
inline constexpr int kAttendSlices = 16;

/// The most that layers which share their work need of it.
struct KltSizes {
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t group = 0;
  int64_t head_dim = 0;
  int64_t part = 0;     ///< channels of a part
  int64_t queries = 0;  ///< query heads of a part
  int64_t n_coef = 0;   ///< see KltTurns
  int64_t ldu = 0;      ///< columns of projected queries: n_index at most and the mean's column
  int64_t latent = 0;   ///< room for the value latents of a part

  static KltSizes of(const KltLayer& layer);
  /// n_index: coordinates that score.
  static KltSizes of(const AttentionShape& shape, int64_t n_rot, int64_t n_index);
  /// The larger of each.
  static KltSizes most(const KltSizes& a, const KltSizes& b);
  bool operator==(const KltSizes&) const = default;
};

/// Rotations of the centres of all blocks of tokens, damped by what averaging over a block leaves: the same
/// for all layers with one RoPE.
struct KltTurns {
  KltTurns(const KltLayer& layer, int64_t block);
  bool serves(const KltLayer& layer) const;
  /// Throws std::bad_alloc.
  void grow(int64_t n_block);

  const kernels::RopeTable* rope;
  int64_t n_coef;            ///< cosines and sines of all pairs, and 1 if some coordinates are not rotated
  int64_t n_sink;            ///< where block 0 begins
  int64_t block;             ///< tokens
  std::vector<double> damp;  ///< [n_rot / 2]: of a pair, times the RoPE's magnitude
  std::vector<float> rows;   ///< [blocks, n_coef] cosines and sines
};

/// What one thread works in.
struct KltThread {
  explicit KltThread(const KltSizes& most);
  bool ok() const;

  KltScratch tile;
  AlignedArray<float> folded;           ///< [n_coef, heads of a part x ldu]: queries folded with the basis
  AlignedArray<uint32_t> folded_pairs;  ///< the same in bfloat16, two coefficients a word
  AlignedArray<float> folded_mean;      ///< [n_coef, queries of a part]: of folded, the columns of the mean
  AlignedArray<float> projected;        ///< [kScoreChunk, heads of a part x ldu]
  AlignedArray<float> projected_mean;   ///< [kScoreChunk, queries of a part]
  AlignedArray<float> step;             ///< [n_index]
  AlignedArray<uint8_t> codes;          ///< expanded index of a page
  AlignedArray<float> key;              ///< [kTile, head_dim] rebuilt
  AlignedArray<kernels::f16_t> half;    ///< [kTile, head_dim] the same, rotated
  AlignedArray<float> score;            ///< [group, kTile]
  AlignedArray<float> weight;           ///< [group]
  AlignedArray<float> cos;              ///< [kTile, head_dim / 2 at most]
  AlignedArray<float> sin;
  AlignedArray<float> latent;        ///< [width of a part] of merging
  AlignedArray<float> amplitude;     ///< [kTile, ld_latent]: of the values, a row a page of the tile
  AlignedArray<float> slice_weight;  ///< [n_head, 2 kSlices]: makes a slice's numbers probabilities
  std::vector<float> weights;        ///< [n_head, ld_run] of a slice's tokens, grown with the context
  std::vector<int32_t> per_page;     ///< [n_page]: selected tokens of all KV heads
  std::vector<int64_t> slice_page;   ///< [kAttendSlices + 1]: first page of a slice
  std::vector<int64_t> slice_begin;  ///< [n_head_kv, kAttendSlices + 1]: first of the selected in it
  std::vector<Part> left;            ///< [heads of a part]: of a slice's selected, those not yet summed
};

/// Softmax states of all query heads over one slice of the selected tokens; the sums are KltWork::latents().
struct KltSlice {
  explicit KltSlice(int64_t n_head) : max(n_head), sum(n_head) {}
  bool ok() const { return max.ok() && sum.ok(); }
  AlignedArray<float> max;  ///< [n_head]
  AlignedArray<float> sum;  ///< [n_head]; 0: empty
};

/// What a step over klt layers works in, and its stages.
struct KltWork final : FamilyWork {
  explicit KltWork(int n) : n_threads(n) {}

  /// Room for a step of `layer` with n tokens in pages, of which n_read are read at most. Serial, while no
  /// step runs. Throws std::bad_alloc.
  void fit(const KltLayer& layer, const KvProfile& profile, int64_t n, int64_t n_read);

  const KltTurns& turns_of(const KltLayer& layer) const;

  /// Sums of a query head over slice i, [ld_latent]; those of a head follow each other. Those of an empty
  /// slice are old ones, perhaps of another layer.
  float* latents(int64_t head, int i) {
    return slice_latents.data() + (head * kAttendSlices + i) * ld_latent;
  }

  int n_threads;
  KltSizes sizes;
  int64_t ld_latent = 0;
  std::vector<KltTurns> turns;  ///< one for each RoPE
  std::vector<std::unique_ptr<KltThread>> threads;
  std::vector<std::unique_ptr<KltSlice>> slices;
  AlignedArray<float> slice_latents;  ///< [n_head, kAttendSlices, ld_latent]

  // Grown with the context; ld is the room for tokens.
  int64_t ld = 0;
  int64_t ld_run = 0;                   ///< most tokens that a head selects in a slice
  std::vector<float> scores;            ///< [n_head, ld]
  std::vector<float> pooled;            ///< [n_head_kv, ld]: of candidates alone, slice by slice
  std::vector<int32_t> candidate;       ///< [n_head_kv, ld]: their tokens
  std::vector<int64_t> n_candidate;     ///< [n_head_kv, kSlices]
  std::vector<int32_t> selected;        ///< [n_head_kv, ld], ascending
  std::vector<int64_t> n_selected;      ///< [n_head_kv]
  std::vector<int32_t> slot;            ///< [n_head_kv, ld]: where the rebuilt keys of the selected are
  std::vector<int32_t> missing;         ///< [n_head_kv, ld]: which of the selected are to be rebuilt
  std::vector<int64_t> n_missing;       ///< [n_head_kv]
  std::vector<float> part_max;          ///< [n_head, 2 kSlices]: of pages, then of exact blocks
  std::vector<float> part_sum;          ///< [n_head, 2 kSlices]; 0: nothing there
  std::atomic<int64_t> next_choice{0};  ///< the next of the tasks of Phase::select
  std::atomic<int> next_slice{0};       ///< the next one to be attended to, counted from the newest
  /// [n_head_kv]: what a KV head selects in this step is known.
  std::vector<std::atomic<bool>> chosen;

 private:
  void make_for(const KltSizes& most);
};

/// Bytes of a KltWork that was fitted to a layer with n tokens in pages, of which n_read are read at most.
int64_t klt_work_bytes(const KltSizes& sizes, int64_t block, int64_t n, int64_t n_read, int n_threads);

// --- klt_score.cpp ---

/// Scores the pages of slices [slices.begin, slices.end) of kSlices for every query head: probabilities up to
/// a factor, of each slice alone, with its maximum and sum in part_max and part_sum. q [n_head, head_dim] is
/// rotated and scaled.
void klt_score(const KltLayer& layer, const KvProfile& profile, const float* q, Part slices, KltWork& work,
               KltThread& thread);

/// Takes the softmax states of exact blocks, slices kSlices + [slices.begin, slices.end) of scratch, into
/// part_max and part_sum.
void klt_note_exact(const AttentionShape& shape, Part slices, StepScratch& scratch, KltWork& work);

// --- klt_select.cpp ---

/// Candidates of every KV head in these slices: tokens whose probability, summed over the head's group, is
/// not so small that all like them together could not matter. Leaves thread.slice_weight for klt_select().
void klt_pool(const KltLayer& layer, const KvProfile& profile, Part slices, KltWork& work, KltThread& thread);

/// The tokens that a KV head reads, work.selected: the best `budget`, or fewer as soon as what is left out is
/// at most 1 - profile.mass of the attention, on average over the group. Exact: ties go to the older token.
void klt_select(const KltLayer& layer, const KvProfile& profile, int64_t budget, int64_t head_kv,
                KltWork& work, const KltThread& thread);

// --- klt_attend.cpp ---

/// Those of tokens [tokens.begin, tokens.end) of the pages that are no anchors, ascending; returns how many.
/// Anchors are read among the exact tokens.
int64_t klt_free_tokens(const KltLayer& layer, Part tokens, int32_t* free);

// Of the selected tokens of all KV heads, those of a slice of the pages: a task, whoever takes it.

/// Cuts the pages into slices, the same for every thread that does so; before the other three.
void klt_cut_slices(const KltLayer& layer, const KltWork& work, KltThread& thread);
/// Asks for what the other two will read: selected tokens lie scattered over more than the CPU's caches.
void klt_prefetch_slice(KltLayer& layer, int slice, const KltWork& work, const KltThread& thread);
/// Rebuilds what is missing of the keys.
void klt_rebuild_slice(KltLayer& layer, int slice, KltWork& work, KltThread& thread);
/// Then attends: sums values as latents into work.slices[slice].
void klt_attend_slice(KltLayer& layer, int slice, const float* q, KltWork& work, KltThread& thread);

/// Attends to the free ones of tokens [tokens.begin, tokens.end) for all KV heads, into a slice; nothing is
/// kept.
void klt_attend_all(const KltLayer& layer, Part tokens, const float* q, KltWork& work, KltThread& thread,
                    int slice);

/// Merges the latent slices and the exact slices kSlices .. of query heads [heads.begin, heads.end) into out.
void klt_merge(const KltLayer& layer, StepScratch& scratch, KltWork& work, KltThread& thread, Part heads,
               const DecodeStep& step);

}  // namespace narrows
