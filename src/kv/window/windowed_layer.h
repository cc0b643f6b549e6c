// What SALS and KIVI layers share: exact sinks, encoded pages, an exact recent window, and the moves between
// them. A codec says how tokens are written into pages and read from them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kv/kv_layer.h"
#include "kv/layout.h"
#include "kv/page_store.h"
#include "kv/window/exact_store.h"

namespace narrows {

/// Tokens that are to be added and lie elsewhere than in the host's memory.
class RowSource {
 public:
  virtual ~RowSource() = default;
  /// Keys before RoPE and values of new tokens [first, first + n), [n, D] each; zeros once status() is an
  /// error.
  virtual void read(int64_t first, int64_t n, float* k, float* v) = 0;
  virtual Status status() const = 0;
};

class WindowedLayer : public KvLayer {
 public:
  Status append(const float* k, const float* v, int64_t n) final;
  Status make_room(bool may_convert) final;
  void store_step(const float* k, const float* v) final;
  void count_step() final;
  void read(int64_t first, int64_t n, float* k, float* v) const final;
  Status seal(int64_t* changed_from) final;
  bool can_keep(int64_t n) const final;
  void keep(int64_t n) final;
  Status share(const KvLayer& from, int64_t n) final;
  void save(SnapshotWriter& out) const final;
  Status load(SnapshotReader& in) final;
  int64_t n_tokens() const final { return sinks_.size() - n_kept_ + n_in_pages_ + window_.size(); }
  LayerBytes bytes() const final;
  void clear() final;

  // For the decode step. Token i of the pages is position n_sink() + i.
  /// Tokens that stay exact for good: the first n_sink, then those of the pages that encode() kept.
  const ExactStore& sinks() const { return sinks_; }
  const ExactStore& window() const { return window_; }
  /// False for tokens in pages that are not kept exact; what is in pages is read as a family selects.
  bool always_reads(int64_t pos) const override {
    return pos < plan_.n_sink || pos >= plan_.n_sink + n_in_pages_;
  }
  int64_t n_sink() const { return plan_.n_sink; }
  int64_t n_in_pages() const { return n_in_pages_; }  ///< those kept exact included
  int64_t n_kept() const { return n_kept_; }          ///< tokens of the pages that sinks() holds too
  int64_t n_page() const { return ceil_div(n_in_pages_, kPageTokens); }
  int64_t page_tokens(int64_t p) const { return std::min(kPageTokens, n_in_pages_ - p * kPageTokens); }
  const std::byte* page(int64_t p) const { return pages_.page(p); }

  // Where a device attends, and has the tokens of steps before this layer has them (kv/klt/cuda/): they are
  // counted, and their blocks are filled before anything else is asked of them.
  /// True if make_room() would read tokens: it encodes, or makes a codec.
  bool encodes_next(bool may_convert) const;
  /// Block b of the window or the sinks, as ExactStore::put_rows().
  void put_rows(bool of_window, int64_t b, const kernels::f16_t* rows) {
    (of_window ? window_ : sinks_).put_rows(b, rows);
  }

 protected:
  WindowedLayer(const AttentionShape& shape, const kernels::RopeTable* rope, const WindowPlan& plan,
                int64_t page_bytes)
      : KvLayer(shape, rope),
        plan_(plan),
        sinks_(shape, rope, kWindowBlock),
        window_(shape, rope, kWindowBlock),
        pages_(page_bytes) {}

  /// Tokens from position n_tokens() on that append() is adding; keys before RoPE, [.., D].
  struct Incoming {
    const float* k = nullptr;
    const float* v = nullptr;
    int64_t n = 0;
    RowSource* rows = nullptr;  ///< not null: k and v are null, and the tokens are its
  };
  /// Some of them: where they lie, or what was read.
  struct Rows {
    const float* k = nullptr;
    const float* v = nullptr;
    std::vector<float> own_k = {}, own_v = {};
  };
  /// [first, first + n) of what comes in.
  Rows rows_of(const Incoming& incoming, int64_t first, int64_t n) const;
  /// append() of n tokens of a source that has checked them. Its errors are passed on.
  Status append_rows(RowSource& rows, int64_t n) { return append_checked({nullptr, nullptr, n, &rows}); }

  /// Before tokens are encoded: may make what the codec needs out of the tokens held and incoming.
  virtual Status make_codec(const Incoming& /*incoming*/) { return {}; }
  virtual bool has_codec() const { return true; }
  /// True if make_codec() would make one now.
  virtual bool can_make_codec() const { return false; }
  virtual int64_t codec_bytes() const { return 0; }
  virtual int64_t hot_bytes() const { return 0; }
  /// Forgets what make_codec() made.
  virtual void drop_codec() {}
  /// Takes over the codec of a layer of the same kind that holds n tokens or more, and what it has gathered
  /// for one up to token n; may throw std::bad_alloc.
  virtual void share_codec(const WindowedLayer& /*from*/, int64_t /*n*/) {}
  /// The codec, if there is one, and what has been gathered for it.
  virtual void save_codec(SnapshotWriter& /*out*/) const {}
  /// Leaves the reader failed if the bytes are none of it; may throw std::bad_alloc.
  virtual void load_codec(SnapshotReader& /*in*/) {}
  /// Tokens from n on have been forgotten, the codec has been made before them or not at all.
  virtual void forget_from(int64_t /*n*/) {}
  /// Tokens of the first n_page pages that were kept exact.
  virtual int64_t count_kept(int64_t /*n_page*/) const { return 0; }

  /// Writes tokens [first, last) of the pages, which have room for them. Tokens before `first` must not
  /// change. May ask for tokens to be kept exact, ascending: they join sinks() when all has gone well.
  virtual Status encode(int64_t first, int64_t last, const Incoming& incoming) = 0;
  void keep_exact(int64_t token) { to_keep_.push_back(token); }
  /// Tokens before this position are in pages for good: what only their encoding needed can go. May not fail.
  virtual void settle(int64_t /*pos*/) {}
  /// Tokens from this position on have not come after all. May not fail.
  virtual void retract(int64_t /*pos*/) {}
  /// As read(), first counted from the pages' begin.
  virtual void decode(int64_t first, int64_t n, float* k, float* v) const = 0;

  /// make_room() of a step: one layer of a session makes its transforms in a step, the others wait.
  Status make_room_in_turn(StepScratch& scratch);

  enum class KeyForm { plain, rotated };  ///< before or after RoPE
  /// Keys and values [n, D] of tokens [first, first + n) of the pages-to-be, from the window and from what
  /// comes in.
  void gather(int64_t first, int64_t n, const Incoming& incoming, KeyForm form, float* k, float* v) const;

  const WindowPlan& plan() const { return plan_; }
  /// For codecs whose pages have a size only when they are made; no page exists yet.
  void set_page_bytes(int64_t bytes) { pages_.set_page_bytes(bytes); }
  std::byte* mutable_page(int64_t p) { return pages_.page(p); }

 private:
  /// Keys before RoPE and values of tokens that are to be kept, [n, D] each.
  struct Kept {
    std::vector<float> k, v;
  };

  Status append_checked(const Incoming& incoming);
  Status append_unguarded(const Incoming& incoming);
  Status encode_up_to(int64_t target, const Incoming& incoming, Kept& kept);
  /// Makes pages up to `target` and the kept tokens count. Cannot fail: their room is reserved.
  void commit_pages(int64_t target, const Kept& kept);
  Status seal_unguarded();

  WindowPlan plan_;
  ExactStore sinks_;   ///< positions [0, n_sink), then n_kept_ of the pages, ascending
  ExactStore window_;  ///< positions from n_sink + n_in_pages_ on
  PageStore pages_;    ///< positions [n_sink, n_sink + n_in_pages_)
  int64_t n_in_pages_ = 0;
  int64_t n_kept_ = 0;
  std::vector<int64_t> to_keep_;  ///< of the encode() that runs
  bool step_is_finite_ = true;
};

}  // namespace narrows
