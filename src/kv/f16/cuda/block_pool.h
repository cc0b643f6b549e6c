// Exact tokens of all layers of a model on a GPU: blocks of 64 tokens (device/device_api.h) in slabs that are
// allocated as sessions grow. A block has a number that is the same for all layers, each of which has its
// pool's beginning: a table of numbers serves all layers. A sequence's blocks may be shared with others.
// A pool may also be of anything else of one size, for one layer after another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "device/device.h"

namespace narrows {

class BlockPool : public std::enable_shared_from_this<BlockPool> {
 public:
  /// Blocks of a layer that a slab has.
  static constexpr int64_t kSlabBlocks = 16;

  /// All layers have n_head_kv heads of head_dim. n_layer 1: whatever layer is asked for, it is that one.
  BlockPool(std::shared_ptr<device::Device> device, int64_t n_layer, int64_t n_head_kv, int64_t head_dim)
      : BlockPool(std::move(device), n_layer, 4 * n_head_kv * head_dim * device::kBlockTokens, kSlabBlocks,
                  "more tokens of the key/value cache") {}
  /// Blocks of so many bytes (a multiple of 16); what: in a sentence of there being no room.
  BlockPool(std::shared_ptr<device::Device> device, int64_t n_layer, int64_t block_bytes, int64_t slab_blocks,
            const char* what)
      : device_(std::move(device)),
        n_layer_(n_layer),
        block_bytes_(block_bytes),
        slab_blocks_(slab_blocks),
        what_(what) {}

  device::Device& device() const { return *device_; }
  int64_t n_layer() const { return n_layer_; }
  /// Of one layer.
  int64_t block_bytes() const { return block_bytes_; }

  /// Where a layer's block 0 would be: block b is b * block_bytes() further, for either sign of b. Stays as
  /// it is once a block has been taken.
  char* layer(int64_t i) const { return base_ + (n_layer_ == 1 ? 0 : i) * slab_blocks_ * block_bytes_; }

  /// For work on blocks that is waited for.
  Result<std::unique_ptr<device::Stream>> make_stream() const { return device::Stream::create(device_); }

  /// A block that is given back when nobody holds it.
  using Block = std::shared_ptr<const int32_t>;
  /// One that holds NaN in all layers, or what it held before; out_of_memory with the figures. Thread-safe.
  Result<Block> take();

 private:
  Status add_slab();
  void give_back(const int32_t* block);

  std::shared_ptr<device::Device> device_;
  int64_t n_layer_, block_bytes_, slab_blocks_;
  const char* what_;
  std::mutex mutex_;
  std::vector<device::Buffer> slabs_;
  std::vector<std::unique_ptr<int32_t>> numbers_;
  std::vector<const int32_t*> free_;
  char* base_ = nullptr;
};

/// The blocks of one sequence, in order. Not thread-safe.
class BlockSequence {
 public:
  explicit BlockSequence(std::shared_ptr<BlockPool> pool) : pool_(std::move(pool)) {}

  BlockPool& pool() const { return *pool_; }
  int64_t n_block() const { return static_cast<int64_t>(blocks_.size()); }
  int32_t block(int64_t i) const { return *blocks_[static_cast<size_t>(i)]; }

  /// Room for tokens [size, n): blocks, the one that size lies in for this sequence alone. out_of_memory:
  /// then there are some more blocks than before.
  Status reserve(int64_t size, int64_t n);
  /// Keeps what n tokens take.
  void truncate(int64_t n);
  /// The first n tokens of another sequence of this pool.
  void share(const BlockSequence& from, int64_t n);

  /// The first token with a key or value that half precision cannot hold; -1: none is known.
  int64_t bad_token() const { return bad_; }
  /// True once the device has not given what was read from it.
  bool lost() const { return lost_; }
  void note_lost() { lost_ = true; }
  void note_bad(int64_t token) { bad_ = bad_ < 0 ? token : std::min(bad_, token); }

 private:
  std::shared_ptr<BlockPool> pool_;
  std::vector<BlockPool::Block> blocks_;
  int64_t bad_ = -1;
  bool lost_ = false;
};

}  // namespace narrows
