// Attention of a prompt over one layer: packed keys and values of all KV heads, and the work of a chunk of
// queries split into tasks that threads take. Between prefill.cpp (ggml's graphs) and the kernels of
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

struct AttentionSizes {
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;
  float scale = 0;  ///< on q.k

  int64_t width() const { return n_head_kv * head_dim; }
};

class PromptAttention {
 public:
  /// Room for n_token tokens; ok() is false if there is no memory.
  PromptAttention(kernels::PrefillKind kind, const AttentionSizes& sizes, int64_t n_token, int n_threads);
  bool ok() const;

  static int64_t bytes_needed(kernels::PrefillKind kind, const AttentionSizes& sizes, int64_t n_token,
                              int n_threads);

  static int64_t tiles(int64_t n) { return (n + kernels::kPrefillTile - 1) / kernels::kPrefillTile; }

  /// Packs tokens [tile * kPrefillTile, .. + n) of one KV head: k rotated, v, both rows of all heads [n, D].
  void pack(int64_t head_kv, int64_t tile, const float* k, const float* v, int64_t n);

  /// Prepares run() for n query rows q [n, n_head * head_dim], rotated, at positions first ..; all keys up to
  /// the last one's are packed. out [n, n_head * head_dim].
  void start(const float* q, int64_t n, int64_t first, float* out);
  /// Called once by each thread ith < n_threads after start(); returns when no task is left.
  void run(int ith);
  /// False if a number that run() wrote since the start is NaN or infinite: never silently in the logits.
  bool finite() const { return !non_finite_; }

 private:
  std::byte* tile(int64_t head_kv, int64_t t) {
    return tiles_.data() + (head_kv * n_tile_ + t) * kernel_.tile_bytes(sizes_.head_dim);
  }

  const kernels::PrefillKernel& kernel_;
  AttentionSizes sizes_;
  int64_t n_tile_;
  AlignedArray<std::byte> tiles_;                 ///< [n_head_kv, n_tile, tile_bytes]
  std::vector<AlignedArray<std::byte>> scratch_;  ///< one a thread

  const float* q_ = nullptr;
  int64_t n_ = 0;
  int64_t first_ = 0;
  float* out_ = nullptr;
  std::atomic<int64_t> next_task_{0};
  std::atomic<bool> non_finite_{false};
};

}  // namespace narrows
