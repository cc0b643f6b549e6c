// Rebuilt keys of one KV head of a klt layer, rotated to their positions, in half precision: those of the
// tokens that the last steps read. About three quarters of what a step selects was selected by the step
// before, and rebuilding is the dearest stage. What is held never changes a result: a key is the same however
// long ago it was rebuilt.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/ops.h"

namespace narrows {

class KltHotKeys {
 public:
  explicit KltHotKeys(int64_t head_dim) : head_dim_(head_dim) {}

  /// Room for n tokens at least; what is held stays. Throws std::bad_alloc, and is then as it was.
  void reserve(int64_t n);
  int64_t capacity() const { return capacity_; }

  /// Gives every token [n] (indices into the pages, ascending, n <= capacity()) a row, slot [n]. Those that
  /// were not held are listed in missing, as indices into `tokens`; returns how many, and their rows are to
  /// be written before they are read. If there is no room, others leave: first those that were not read for
  /// long (kOldest steps are as good as more), of equals the older tokens.
  int64_t hold(std::span<const int32_t> tokens, int32_t* slot, int32_t* missing);

  /// [capacity, head_dim]; row(slot).
  const kernels::f16_t* rows() const { return key_.data(); }
  kernels::f16_t* row(int32_t slot) { return key_.data() + slot * head_dim_; }

  /// Forgets all tokens and gives the room back.
  void clear();
  int64_t bytes() const;

  static constexpr uint32_t kOldest = 63;

 private:
  /// A token that is held.
  struct Held {
    int32_t token;
    int32_t slot;
    uint32_t used;  ///< clock of the last step that read it
  };
  void make_room(int64_t n_missing);

  int64_t head_dim_;
  int64_t capacity_ = 0;
  std::vector<kernels::f16_t> key_;
  std::vector<Held> held_;     ///< by token; room for capacity
  std::vector<Held> buffer_;   ///< room for capacity
  std::vector<int32_t> free_;  ///< slots that hold none
  uint32_t clock_ = 0;
};

}  // namespace narrows
