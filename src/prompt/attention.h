// Attention of a prompt over one layer: packed keys and values of all KV heads, and the work of a chunk of
// queries split into tasks that threads take. Between prefill.cpp and the kernels of
// kernels/prefill_kernel.h (one head, raw pointers).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "kernels/ops.h"
#include "narrows/config.h"

namespace narrows {

/// The kernel in the table that runs here.
kernels::PrefillKind attention_kind(PrefillAttention attention);

/// True if prompts in this precision can leave keys out (PromptOptions::mass below 1).
bool can_be_sparse(PrefillAttention attention);

struct AttentionSizes {
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;
  float scale = 0;  ///< on q.k

  int64_t width() const { return n_head_kv * head_dim; }
  bool operator==(const AttentionSizes&) const = default;
};

class PromptAttention {
 public:
  /// Room for n_token tokens; ok() is false if there is no memory. mass: see PromptOptions; below 1 the
  /// kernel must be able to look().
  PromptAttention(kernels::PrefillKind kind, const AttentionSizes& sizes, int64_t n_token, int n_threads,
                  double mass = 1);
  bool ok() const;

  static int64_t bytes_needed(kernels::PrefillKind kind, const AttentionSizes& sizes, int64_t n_token,
                              int n_threads, double mass = 1);

  static int64_t tiles(int64_t n) { return (n + kernels::kPrefillTile - 1) / kernels::kPrefillTile; }

  /// Packs tokens [tile * kPrefillTile, .. + n) of one KV head: k rotated, v, both rows of all heads [n, D].
  void pack(int64_t head_kv, int64_t tile, const float* k, const float* v, int64_t n);

  /// Prepares run() for n query rows q [n, n_head * head_dim], rotated, at positions first ..; all keys that
  /// they see are packed. window: tokens that a row sees, itself included; 0: all. out [n, n_head *
  /// head_dim]. sinks [n_head] or null: scores that belong to no token.
  void start(const float* q, int64_t n, int64_t first, int64_t window, float* out,
             const float* sinks = nullptr);
  /// True if some of n rows from position first on may leave tiles out, which those with a window do not;
  /// then choose() comes before run(). A sparse call has kMaxBlocks * kQueryRows (512) rows at most: more are
  /// dense.
  bool is_sparse(int64_t n, int64_t first, int64_t window) const;
  /// Called once by each thread ith < n_threads after start(): every kSampleStep-th row looks at all tiles,
  /// and each block of kQueryRows rows of a head takes those that its sample looks at most.
  void choose(int ith);
  /// Called once by each thread after start(), and after choose() by all of them; returns when no task is
  /// left.
  void run(int ith);
  /// False if a number that run() wrote since the start is NaN or infinite: never silently in the logits.
  bool finite() const { return !non_finite_; }
  /// Tiles that blocks of rows which chose have read since it was made, and those that they could have read.
  int64_t tiles_read() const { return tiles_read_; }
  int64_t tiles_seen() const { return tiles_seen_; }

 private:
  /// Rows between two of the sample, and the most of them in a call.
  static constexpr int64_t kSampleStep = 16;
  static constexpr int64_t kMaxBlocks = kernels::kLookRows * kSampleStep / kernels::kQueryRows;

  /// What all calls for rows of a head from `row` on have in common.
  kernels::PrefillRows rows_of(int64_t head, int64_t row, int ith);
  void choose_block(int64_t head, int64_t block);
  float* share(int64_t head) { return share_.data() + head * n_tile_ * kernels::kLookRows; }
  uint8_t* skip(int64_t head, int64_t block) { return skip_.data() + (head * kMaxBlocks + block) * n_tile_; }
  std::byte* tile(int64_t head_kv, int64_t t) {
    return tiles_.data() + (head_kv * n_tile_ + t) * kernel_.tile_bytes(sizes_.head_dim);
  }

  const kernels::PrefillKernel& kernel_;
  AttentionSizes sizes_;
  int64_t n_tile_;
  AlignedArray<std::byte> tiles_;                 ///< [n_head_kv, n_tile, tile_bytes]
  std::vector<AlignedArray<std::byte>> scratch_;  ///< one a thread
  double mass_;
  AlignedArray<float> share_;   ///< [n_head, n_tile, kLookRows]; empty if dense
  AlignedArray<uint8_t> skip_;  ///< [n_head, kMaxBlocks, n_tile]

  const float* q_ = nullptr;
  int64_t n_ = 0;
  int64_t first_ = 0;
  int64_t window_ = 0;
  float* out_ = nullptr;
  const float* sinks_ = nullptr;
  bool sparse_ = false;  ///< the rows since start() leave tiles out
  std::atomic<int64_t> next_task_{0};
  std::atomic<int64_t> next_choice_{0};
  std::atomic<int64_t> tiles_read_{0};
  std::atomic<int64_t> tiles_seen_{0};
  std::atomic<bool> non_finite_{false};
};

}  // namespace narrows
