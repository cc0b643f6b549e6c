// Anchors: tokens of a page that draw so much attention from all that follows that an error of theirs
// outweighs those of all others. Models pour probability into a few of them, often empty words, as they do
// into the very first tokens. They are found by the queries of the tokens right after the page and stay
// exact, as sinks do. docs/klt.md has the figures. Pipeline step 5.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/half.h"
#include "kv/kv_layer.h"
#include "kv/snapshot.h"

namespace narrows {

/// One query in this many is looked at: four judge a page, and more find the same tokens.
inline constexpr int64_t kQueryStride = 16;

/// A token that gets this share of a layer's attention, averaged over its query heads and the sampled
/// queries, is an anchor.
inline constexpr float kAnchorShare = 0.15F;

/// Every kQueryStride-th query of a layer, before RoPE, from a moving first position on.
class QuerySamples {
 public:
  /// n_sink: the sampled positions are n_sink + i kQueryStride, those where pages end among them.
  QuerySamples(const AttentionShape& shape, int64_t n_sink)
      : width_(shape.n_head * shape.head_dim), n_sink_(n_sink), first_(n_sink) {}

  /// Queries [n, n_head, head_dim] of the next n positions. Throws std::bad_alloc, then nothing has changed.
  void add(const float* q, int64_t n);
  /// True if the next query will be sampled; of others add() reads nothing.
  bool wants_next() const { return next_ >= first_ && (next_ - first_) % kQueryStride == 0; }
  /// Forgets those before pos.
  void drop_before(int64_t pos);
  /// Forgets those from pos on: the next query is that of pos.
  void drop_from(int64_t pos);
  /// The query at pos, [n_head, head_dim]; null if it was not sampled.
  const kernels::f16_t* at(int64_t pos) const;
  /// Rows from position `first` on in place of those held; the next query is that of `next`.
  void replace(int64_t first, int64_t next, std::vector<kernels::f16_t> rows) {
    first_ = first;
    next_ = next;
    rows_ = std::move(rows);
  }
  int64_t first() const { return first_; }
  void save(SnapshotWriter& out) const;
  /// Leaves the reader failed if the bytes are none; may throw std::bad_alloc.
  void load(SnapshotReader& in, int64_t n_ctx);
  int64_t bytes() const { return static_cast<int64_t>(rows_.capacity() * sizeof(kernels::f16_t)); }

 private:
  int64_t width_;
  int64_t n_sink_;
  int64_t first_;                     ///< position of the first row
  int64_t next_ = 0;                  ///< position of the query that comes next
  std::vector<kernels::f16_t> rows_;  ///< [.., width]
};

/// Rotated keys [n, D] and what stands where, for the search in one page.
struct AnchorSearch {
  const float* sinks = nullptr;  ///< [n_sink, D]: most of the probability goes there
  int64_t n_sink = 0;
  const float* page = nullptr;  ///< [kPageTokens + n_after, D]: the page's tokens and those that follow
  int64_t n_after = 0;          ///< at least 1 for anything to be found
  int64_t pos = 0;              ///< of the page's first token
};

/// Of shares [kPageTokens] of the attention, those that are `least` or more, the strongest first, `most` of
/// them; they become 0.
uint64_t pick_anchors(float* share, float least, int64_t most);

/// Bit t: token t of the page is an anchor; at most `most` of them, the strongest. Probabilities are those of
/// a softmax over the keys given.
uint64_t find_anchors(const AttentionShape& shape, const kernels::RopeTable& rope,
                      const QuerySamples& queries, const AnchorSearch& search, int64_t most);

}  // namespace narrows
