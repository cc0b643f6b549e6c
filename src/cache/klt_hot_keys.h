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
  int64_t capacity() const { return static_cast<int64_t>(token_.size()); }

  /// Gives every token [n] (indices into the pages, ascending, n <= capacity()) a row, slot [n]. Those that
  /// were not held are listed in missing, as indices into `tokens`; returns how many, and their rows are to
  /// be written before they are read. The least recently used others leave if there is no room.
  int64_t hold(std::span<const int32_t> tokens, int32_t* slot, int32_t* missing);

  /// [capacity, head_dim]; row(slot).
  const kernels::f16_t* rows() const { return key_.data(); }
  kernels::f16_t* row(int32_t slot) { return key_.data() + slot * head_dim_; }

  /// Forgets all tokens, keeps the room.
  void clear();
  int64_t bytes() const;

 private:
  void make_room(int64_t n_missing);

  int64_t head_dim_;
  std::vector<kernels::f16_t> key_;
  std::vector<int32_t> token_;   ///< [capacity] of each slot, where it holds one
  std::vector<uint32_t> used_;   ///< [capacity] clock of the last step that read it
  std::vector<int32_t> order_;   ///< slots that hold a token, by token; room for capacity
  std::vector<int32_t> free_;    ///< the others
  std::vector<int32_t> buffer_;  ///< room for capacity
  uint32_t clock_ = 0;
};

}  // namespace narrows
