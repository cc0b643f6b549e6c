// The key/value cache of one layer behind one interface: how tokens are stored, and a decode step's attention
// over them. Pipeline steps 5 and 6. A family of caches is a folder beside this file. Every profile but f16
// keeps the first n_sink and the last n_recent (or a few more) tokens exact and encodes what lies between;
// docs/cache_layout.md draws it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "base/workers.h"
#include "kernels/delta_net.h"
#include "kernels/rope_table.h"
#include "kv/snapshot.h"
#include "narrows/config.h"
#include "narrows/status.h"

namespace narrows {

/// Heads of one layer's attention. D = width() = n_head_kv * head_dim.
struct AttentionShape {
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;
  float scale = 0;  ///< on q.k, 1 / sqrt(head_dim)

  int64_t group() const { return n_head / n_head_kv; }
  int64_t width() const { return n_head_kv * head_dim; }
};

/// The new token of a layer in a decode step. Pointers are valid during the step.
struct DecodeStep {
  const float* q = nullptr;  ///< [n_head, head_dim] before RoPE
  const float* k = nullptr;  ///< [n_head_kv, head_dim] before RoPE
  const float* v = nullptr;  ///< [n_head_kv, head_dim]
  float* out = nullptr;      ///< [n_head, head_dim], written in the last phase
  const float* sinks =
      nullptr;  ///< [n_head] or null: a score of each head's softmax that belongs to no token
  /// Of a recurrent layer: q is its projected row, k and v are null, out is [width_v].
  const kernels::DeltaNet* delta_net = nullptr;
};

/// Tokens of a prompt that go through a recurrent layer's state, in order.
struct RecurrentRows {
  const kernels::DeltaNet* net = nullptr;
  const float* x = nullptr;  ///< [n, ld] projected rows
  int64_t ld = 0;
  float* out = nullptr;  ///< [n, ldo], width_v numbers each
  int64_t ldo = 0;
  int64_t n = 0;
  float* work = nullptr;  ///< [n_threads] times work_floats()

  static constexpr int kPhases = 2;
  static int64_t work_floats(const kernels::DeltaNetShape& shape) {
    return 3 * (kernels::kDeltaTile + shape.n_conv) * shape.head_dim + 2 * kernels::kDeltaTile +
           kernels::delta_work_floats(shape.head_dim);
  }
};

class StepScratch;  // kv/step/step_scratch.h

/// Bytes as allocated (capacity, not use).
struct LayerBytes {
  int64_t pages = 0;  ///< encoded pages, and blocks of their tokens that stay exact
  int64_t exact = 0;  ///< sinks and recent window, or all tokens of an f16 layer
  int64_t basis = 0;  ///< transforms that belong to this cache alone
  int64_t hot = 0;    ///< rebuilt keys kept from step to step; none before the first step
  int64_t n_tokens_in_pages = 0;
  int64_t total() const { return pages + exact + basis + hot; }
  /// The part in PageStores, which count themselves in the memory ledger.
  int64_t in_stores() const { return pages + exact; }
};

/// Not thread-safe but where a method says so. Keys come in before RoPE, [n, D] row-major, heads one after
/// another; position of a token = number of tokens before it.
class KvLayer {
 public:
  virtual ~KvLayer() = default;

  // --- Storage ---

  /// Adds n tokens (prefill). May convert everything held so far, e.g. when enough tokens are there to
  /// compute a basis. non_finite if a key or value is NaN, infinite or beyond f16's 65504 (names the token);
  /// the layer then holds what it held before.
  virtual Status append(const float* k, const float* v, int64_t n) = 0;

  // A recurrent layer has no keys: its tokens of a prompt come here chunk by chunk, and append(null, null, n)
  // then counts those that have come. Phases as in a step.

  /// Serial, before a chunk of n: all of it that can fail.
  virtual Status begin_rows(int64_t /*n*/) { return not_recurrent(); }
  virtual void run_rows(int /*phase*/, const RecurrentRows& /*rows*/, int /*ith*/, int /*n_threads*/) {}

  /// Makes room for one more token: allocates, and encodes tokens that leave the recent window. Serial,
  /// between steps. may_convert: false keeps a layer that has no transforms yet from making them.
  virtual Status make_room(bool may_convert) = 0;
  /// Stores that token (k before RoPE, v, [D]); it counts in n_tokens() from count_step() on. One thread;
  /// others may read older tokens meanwhile.
  virtual void store_step(const float* k, const float* v) = 0;
  virtual void count_step() = 0;

  /// Keys ROTATED to their positions and values of tokens [first, first + n) as a reader sees them (decoded),
  /// [n, D] each. For later prompts, tests and eval. Thread-safe among readers.
  virtual void read(int64_t first, int64_t n, float* k, float* v) const = 0;

  /// Queries before RoPE [n, n_head, head_dim] of tokens that append() or a step brings: what a codec that is
  /// still to be made weighs errors by. Serial.
  virtual void observe_queries(const float* /*q*/, int64_t /*n*/) {}
  virtual bool wants_queries() const { return false; }
  /// Of a prompt's queries only those at positions that this divides are looked at; 1: all.
  virtual int64_t query_stride() const { return 1; }

  /// Threads for append(); null (as made): the caller's alone. They outlive the layer. What is stored does
  /// not depend on them.
  void use_workers(Workers* workers) { workers_ = workers; }

  /// The end of a segment of a prompt that is not its last (WindowPlan::segmented): encodes every token that
  /// it can, recent ones too. `changed_from` becomes the first position that read() now gives otherwise.
  virtual Status seal(int64_t* changed_from) {
    *changed_from = n_tokens();
    return {};
  }

  /// True if the cache can become that of its first n tokens without a number being encoded anew.
  virtual bool can_keep(int64_t n) const = 0;
  /// True if what append() brings never takes away a place that can_keep().
  virtual bool goes_back_anywhere() const { return true; }
  /// Forgets tokens from n on; can_keep(n).
  virtual void keep(int64_t n) = 0;
  /// Becomes the first n tokens of a layer of the same profile and shape, which can_keep(n), and shares its
  /// pages; either may then grow on its own. Not thread-safe on either. out_of_memory: then this one is
  /// empty.
  virtual Status share(const KvLayer& from, int64_t n) = 0;

  /// All that the layer holds, for load() of a layer of the same profile and shape.
  virtual void save(SnapshotWriter& out) const = 0;
  /// Holds what another layer saved, in place of what it held. invalid_file if the bytes are not that, or
  /// out_of_memory; then it is empty.
  virtual Status load(SnapshotReader& in) = 0;

  virtual int64_t n_tokens() const = 0;
  virtual LayerBytes bytes() const = 0;
  virtual void clear() = 0;  ///< forgets tokens and a basis made from them; a basis from a file stays

  // --- A decode step: score -> select -> rebuild -> attend, as far as a family has them ---
  // It runs in phases: all threads finish phase p before any begins phase p + 1.

  /// Serial, before each step: makes room, grows the scratch. Everything of a step that can fail.
  virtual Status begin_step(StepScratch& scratch) = 0;
  /// Of the step that has begun.
  virtual int n_phase() const = 0;
  virtual void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) = 0;
  /// Serial, after the last phase: the token counts.
  virtual void end_step() { count_step(); }

  /// Positions that a KV head read from pages in the last step (ascending), beside those that
  /// always_reads(); nullopt if every token was read.
  virtual std::optional<std::span<const int32_t>> last_selection(int64_t /*head_kv*/) const {
    return std::nullopt;
  }
  /// True if every step reads the token at this position, whatever it selects.
  virtual bool always_reads(int64_t /*pos*/) const { return true; }

  const AttentionShape& shape() const { return shape_; }
  const kernels::RopeTable& rope() const { return *rope_; }

 protected:
  KvLayer(const AttentionShape& shape, const kernels::RopeTable* rope) : shape_(shape), rope_(rope) {}
  Workers* workers() const { return workers_; }

 private:
  static Status not_recurrent() { return {StatusCode::internal, "rows for a layer that is not recurrent"}; }

  AttentionShape shape_;
  const kernels::RopeTable* rope_;  ///< outlives the cache
  Workers* workers_ = nullptr;
};

}  // namespace narrows
