// Snapshots of a recurrent layer: its state behind some first tokens. A state cannot be turned back, so that
// a conversation which goes on from an earlier place needs one that was kept. Kept are, at places that lie
// kSegmentTokens apart, four at most:
//
//   - of the prompt read last the two newest (a template may rewrite a prompt's last tokens),
//   - the newest from before that prompt,
//   - of steps since then the newest; or, in a cache with segments, which makes none in steps, the older of
//     the first prompt's two: where its document ends, for other questions about it.
//
// Pages are shared with the running state until that goes on, and with other sequences.
#pragma once

#include <vector>

#include "kv/page_store.h"
#include "narrows/status.h"

namespace narrows {

class RecurrentMarks {
 public:
  enum class Kind : int64_t { first, previous, prompt, step };
  struct Mark {
    int64_t n = 0;  ///< tokens that the state has seen
    Kind kind = Kind::prompt;
    PageStore state;
  };
  static constexpr int64_t kMost = 4;

  /// keeps_first: of the first prompt one stays.
  RecurrentMarks(int64_t state_bytes, bool keeps_first)
      : state_bytes_(state_bytes), keeps_first_(keeps_first) {}

  /// Another prompt begins to be read.
  void begin_prompt();
  /// A mark behind n tokens with a state of its own, or of `from` if that is given; n is above all others.
  /// Throws std::bad_alloc.
  PageStore& add(int64_t n, Kind kind, const PageStore* from);
  const Mark* at(int64_t n) const;
  bool empty() const { return marks_.empty(); }
  int64_t last() const { return marks_.empty() ? 0 : marks_.back().n; }
  /// Forgets marks behind more than n tokens.
  void keep(int64_t n);
  void clear() { marks_.clear(); }
  /// Becomes those of `from` behind n tokens at most. Throws std::bad_alloc.
  void share(const RecurrentMarks& from, int64_t n);

  void save(SnapshotWriter& out) const;
  /// False if the bytes are not that, of n tokens at most, or there is no memory.
  bool load(SnapshotReader& in, int64_t n);
  int64_t bytes() const;

 private:
  PageStore empty_page() const { return PageStore(state_bytes_); }
  void drop_oldest(Kind kind, int64_t most);

  int64_t state_bytes_;
  bool keeps_first_;
  std::vector<Mark> marks_;  ///< ascending
};

}  // namespace narrows
