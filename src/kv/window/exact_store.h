// Exact tokens in f16: a row of blocks that grows at the back and is popped at the front. Serves as a whole
// f16 layer, as the attention sinks and as the recent window. Keys go in before RoPE and are kept rotated.
#pragma once

#include <cstdint>

#include "kv/kv_layer.h"
#include "kv/layout.h"
#include "kv/page_store.h"

namespace narrows {

class ExactStore {
 public:
  /// block: a multiple of 16.
  ExactStore(const AttentionShape& shape, const kernels::RopeTable* rope, int64_t block)
      : layout_{shape.n_head_kv, shape.head_dim, block}, rope_(rope), blocks_(layout_.bytes()) {}

  int64_t size() const { return size_; }
  int64_t bytes() const { return blocks_.bytes(); }
  const ExactLayout& layout() const { return layout_; }

  /// Room for n more tokens; false if there is no memory, then nothing has changed.
  bool reserve(int64_t n) { return reserve_blocks(ceil_div(size_ + n, layout_.block)); }
  /// The same, counted in blocks of the whole store. The block that is not full yet becomes the store's own.
  bool reserve_blocks(int64_t n) {
    return blocks_.grow_to(n) && (size_ % layout_.block == 0 || blocks_.own(size_ / layout_.block));
  }

  /// Adds n tokens at positions pos .. (k before RoPE, v: [n, D]) into reserved room.
  void push(int64_t pos, const float* k, const float* v, int64_t n) {
    write(size_, pos, k, v, n);
    size_ += n;
  }

  /// The token of a running step: expected (serial), stored (one thread; others may read all older tokens),
  /// counted (serial). Between expect_step and count_step, n_visible() is one more than size().
  bool expect_step();
  void expect_nothing() { expected_ = 0; }
  /// False if a number did not fit f16; it is then stored as infinity or NaN.
  bool store_step(int64_t pos, const float* k, const float* v) { return write(size_, pos, k, v, 1); }
  void count_step() {
    size_ += expected_;
    expected_ = 0;
  }

  void pop_blocks(int64_t n);  ///< oldest first; a block need not be full if it is the last
  void truncate(int64_t n) {   ///< keeps the oldest n tokens
    if (n < size_) size_ = n;
    blocks_.shrink_to(ceil_div(size_, layout_.block));
  }
  /// The first n tokens of another store of this layout, sharing its blocks; throws std::bad_alloc.
  void share(const ExactStore& from, int64_t n) {
    blocks_.share(from.blocks_, ceil_div(n, layout_.block));
    size_ = n;
    expected_ = 0;
  }
  void save(SnapshotWriter& out) const {
    out.number(size_);
    blocks_.save(out);
  }
  /// At most n_max tokens in place of those held; false if the bytes are none, then it is empty.
  bool load(SnapshotReader& in, int64_t n_max) {
    clear();
    const int64_t n = in.count(0, n_max);
    if (!in.ok() || !blocks_.load(in, ceil_div(n, layout_.block))) return false;
    size_ = n;
    return true;
  }
  void clear();

  // For attention: blocks of the running step.
  int64_t n_visible() const { return size_ + expected_; }
  int64_t n_block() const { return ceil_div(n_visible(), layout_.block); }
  int64_t block_tokens(int64_t b) const { return std::min(layout_.block, n_visible() - b * layout_.block); }
  const kernels::f16_t* key_t(int64_t b, int64_t head) const { return layout_.key_t(blocks_.page(b), head); }
  const kernels::f16_t* value(int64_t b, int64_t head) const { return layout_.value(blocks_.page(b), head); }

  /// Block b as a device has it, [2][n_head_kv, block, head_dim]: keys token by token, then values; tokens
  /// that the store does not hold mean nothing. put_rows(): of a block that is this store's alone.
  void get_rows(int64_t b, kernels::f16_t* rows) const;
  void put_rows(int64_t b, const kernels::f16_t* rows);

  /// Tokens [first, first + n) of the store: keys rotated, values; [n, D] each.
  void read(int64_t first, int64_t n, float* k, float* v) const;

 private:
  bool write(int64_t index, int64_t pos, const float* k, const float* v, int64_t n);

  ExactLayout layout_;
  const kernels::RopeTable* rope_;
  PageStore blocks_;
  int64_t size_ = 0;
  int64_t expected_ = 0;  ///< 1 during a step whose token goes here
};

/// Turns keys [n, D] at positions pos .. to their rotation, or back. x may be y.
void rotate_keys(const AttentionShape& shape, const kernels::RopeTable& rope, int64_t pos, int64_t n,
                 bool inverse, const float* x, float* y);

/// non_finite, naming the first bad token, if a value or a rotated key of tokens pos .. is not finite or
/// beyond f16.
Status check_tokens(const AttentionShape& shape, const kernels::RopeTable& rope, int64_t pos, const float* k,
                    const float* v, int64_t n);

Status non_finite_token(int64_t pos);
/// Why a layer could not be loaded: the bytes are wrong, or else there was no memory.
Status not_a_layer(const SnapshotReader& in);
Status no_memory_for_tokens(int64_t n);

}  // namespace narrows
