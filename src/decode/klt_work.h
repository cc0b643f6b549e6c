// What a step over klt layers works in, beside StepScratch: shared by all layers of a session.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "cache/klt_layer.h"
#include "decode/scratch.h"
#include "decode/stages.h"

namespace narrows {

/// Page blocks whose queries are rotated and projected together: enough rows for a good product, few enough
/// that they stay in the L1 cache.
inline constexpr int64_t kScoreChunk = 16;

/// Query rows of a KV head that one product of scores takes (columns of a padded product).
inline constexpr int64_t kScoreColumns = 16;

struct KltWork {
  KltWork(const KltLayer& layer, const KvProfile& profile, int n_threads);
  bool ok() const;

  struct Thread {
    Thread(const KltLayer& layer, int64_t blocks_a_page);
    bool ok() const;

    KltScratch tile;
    AlignedArray<float> query;  ///< [n_head, head_dim] turned by half a position, damped
    AlignedArray<float>
        turned;  ///< [kScoreChunk blocks, group, head_dim]: queries turned to a block's centre
    AlignedArray<float> projected;  ///< [n_head_kv, kScoreChunk blocks, group, ldu]
    AlignedArray<float> step;       ///< [n_index]
    AlignedArray<uint8_t> codes;    ///< expanded index of a page
    AlignedArray<float> key;        ///< [kTile, head_dim]
    AlignedArray<float> query_t;    ///< [head_dim, columns] of one KV head, transposed
    AlignedArray<float> score;      ///< [kTile, columns]
    AlignedArray<float> weight;     ///< [kTile]
    AlignedArray<float> cos;        ///< [kTile, head_dim / 2 at most]
    AlignedArray<float> sin;
    AlignedArray<float> latent;  ///< [width of a part] of merging
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
  int64_t columns;              ///< group, padded
  int64_t ldu;                  ///< of projected queries: n_index at most, the mean's column, padding
  std::vector<float> half_cos;  ///< [n_rot / 2] of half a position
  std::vector<float> half_sin;
  std::vector<float> damp;  ///< [n_rot / 2]: what averaging a pair over a block leaves of it, magnitude^2
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Slice>> slices;

  // Grown with the context; ld is the room for tokens.
  int64_t ld = 0;
  std::vector<float> scores;          ///< [n_head, ld]
  std::vector<float> pooled;          ///< [n_head_kv, ld]
  std::vector<int32_t> selected;      ///< [n_head_kv, ld], ascending
  std::vector<uint64_t> select_work;  ///< [n_head_kv, ..]
  int64_t ld_select = 0;
  std::vector<float> pool_weight;  ///< [kSlices, n_head]
  std::vector<float> part_max;     ///< [kSlices, n_head]
  std::vector<float> part_sum;     ///< [kSlices, n_head]; 0: no pages
  /// Room for n tokens of `shape`; throws std::bad_alloc.
  void grow(const AttentionShape& shape, int64_t n);
};

// --- klt_score.cpp ---

/// Scores pages [pages.begin, pages.end) for every query head: probabilities up to a factor, of this part
/// alone, with its maximum and sum in part_max and part_sum. q [n_head, head_dim] is rotated and scaled.
void klt_score_part(const KltLayer& layer, const KvProfile& profile, const float* q, int part, Part pages,
                    KltWork& work, KltWork::Thread& thread);

/// Pools the query heads of a KV head: probability of each token, summed over the group, into work.pooled.
/// exact: the slices of sinks and recent tokens, whose share of a head's probability counts too.
void klt_pool(const KltLayer& layer, int64_t head_kv, int64_t n_page, StepScratch& scratch, KltWork& work);

// --- klt_attend.cpp ---

/// Attends to `tokens` of the pages, ascending, for KV heads [heads.begin, heads.end), into a slice.
void klt_attend(const KltLayer& layer, std::span<const int32_t> tokens, Part heads, const float* q,
                KltWork& work, KltWork::Thread& thread, KltWork::Slice& slice);

/// Merges the latent slices and the exact slices kSlices .. of query heads [heads.begin, heads.end) into out.
void klt_merge(const KltLayer& layer, StepScratch& scratch, KltWork& work, KltWork::Thread& thread,
               Part heads, float* out);

}  // namespace narrows
