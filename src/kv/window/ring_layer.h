// The cache of a layer that sees a window of tokens: exact in f16, those that no later query can see go,
// block by block. So that a prompt which shares a beginning with an earlier one can go on from there, the
// window's tokens at some ends of segments stay too: marks.
#pragma once

#include <vector>

#include "kv/window/exact_store.h"

namespace narrows {

class RingLayer final : public KvLayer {
 public:
  /// window: tokens that a query sees, itself included; at least 1.
  RingLayer(const AttentionShape& shape, const kernels::RopeTable* rope, int64_t window)
      : KvLayer(shape, rope), window_(window), store_(shape, rope, kDenseBlock) {}

  Status append(const float* k, const float* v, int64_t n) override;
  Status make_room(bool may_convert) override;
  void store_step(const float* k, const float* v) override {
    step_is_finite_ = store_.store_step(n_tokens(), k, v);
  }
  void count_step() override { store_.count_step(); }
  /// Tokens that are held; zeros for those that are not.
  void read(int64_t first, int64_t n, float* k, float* v) const override;
  Status seal(int64_t* changed_from) override;
  bool can_keep(int64_t n) const override;
  bool goes_back_anywhere() const override { return false; }
  void keep(int64_t n) override;
  Status share(const KvLayer& from, int64_t n) override;
  void save(SnapshotWriter& out) const override;
  Status load(SnapshotReader& in) override;
  int64_t n_tokens() const override { return first_ + store_.size(); }
  LayerBytes bytes() const override;
  void clear() override;

  Status begin_step(StepScratch& scratch) override;
  int n_phase() const override { return 2; }
  void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) override;

  /// First token held behind n of them: what the next query sees and kSlack more, whole tiles of a prompt.
  static int64_t first_held(int64_t n, int64_t window);
  /// Bytes behind n tokens of a prompt; segmented: marks included.
  static int64_t bytes_for(const AttentionShape& shape, int64_t window, int64_t n, bool segmented);

 private:
  /// What a later query sees of the first n tokens.
  struct Mark {
    int64_t n;
    int64_t first;  ///< position of the store's first token
    ExactStore store;
  };

  /// First token that a query behind n tokens sees.
  int64_t seen_from(int64_t n) const { return std::max<int64_t>(0, n + 1 - window_); }
  bool holds(int64_t n) const { return n <= n_tokens() && (n == 0 || seen_from(n) >= first_); }
  const Mark* mark_at(int64_t n) const;
  void drop_unseen(int64_t n);
  Mark mark_of(int64_t n) const;

  int64_t window_;
  int64_t first_ = 0;  ///< position of store_'s first token, a multiple of kTile
  ExactStore store_;
  std::vector<Mark> marks_;  ///< ascending
  bool step_is_finite_ = true;
};

}  // namespace narrows
