#include "kv/f16/cuda/block_pool.h"

#include <limits>

namespace narrows {

namespace {

int64_t blocks_of(int64_t n) { return (n + device::kBlockTokens - 1) / device::kBlockTokens; }

}  // namespace

Result<BlockPool::Block> BlockPool::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) {
    if (Status s = add_slab(); !s.ok()) return s;
  }
  const int32_t* number = free_.back();
  free_.pop_back();
  return Block(number, [pool = shared_from_this()](const int32_t* b) { pool->give_back(b); });
}

void BlockPool::give_back(const int32_t* block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(block);  // has had room for all since the slab was added
}

/// A slab's layers lie one after another, slab_blocks_ blocks each: block b of the slab in layer l is
/// l * slab_blocks_ + b blocks behind its beginning, which is a whole number of blocks from base_.
Status BlockPool::add_slab() {
  const int64_t block = block_bytes(), bytes = n_layer_ * slab_blocks_ * block;
  Result<device::Buffer> made = device_->allocate(bytes + block, what_);
  if (!made.ok()) return made.status();
  char* at = made->data<char>();
  if (base_ != nullptr) at += ((base_ - at) % block + block) % block;
  const int64_t number = base_ == nullptr ? 0 : (at - base_) / block;
  if (number > std::numeric_limits<int32_t>::max() / 2 || number < std::numeric_limits<int32_t>::min() / 2)
    return {StatusCode::out_of_memory, "the GPU's memory is too far apart for the key/value cache's tables"};
  free_.reserve(numbers_.size() + static_cast<size_t>(slab_blocks_));
  numbers_.reserve(numbers_.size() + static_cast<size_t>(slab_blocks_));
  slabs_.reserve(slabs_.size() + 1);
  Result<std::unique_ptr<device::Stream>> stream = make_stream();
  if (!stream.ok()) return stream.status();
  (*stream)->fill(at, 0xFF, bytes);
  (*stream)->wait();
  if (Status s = (*stream)->take_error(); !s.ok()) return s;
  for (int64_t b = slab_blocks_ - 1; b >= 0; --b) {
    numbers_.push_back(std::make_unique<int32_t>(static_cast<int32_t>(number + b)));
    free_.push_back(numbers_.back().get());
  }
  slabs_.push_back(std::move(*made));
  if (base_ == nullptr) base_ = at;
  return {};
}

Status BlockSequence::reserve(int64_t size, int64_t n) {
  const auto last = static_cast<size_t>(size / device::kBlockTokens);
  if (size % device::kBlockTokens != 0 && blocks_[last].use_count() > 1) {
    Result<BlockPool::Block> own = pool_->take();
    if (!own.ok()) return own.status();
    Result<std::unique_ptr<device::Stream>> stream = pool_->make_stream();
    if (!stream.ok()) return stream.status();
    const int64_t bytes = pool_->block_bytes();
    for (int64_t i = 0; i < pool_->n_layer(); ++i)
      (*stream)->copy(pool_->layer(i) + **own * bytes, pool_->layer(i) + *blocks_[last] * bytes, bytes);
    (*stream)->wait();
    if (Status s = (*stream)->take_error(); !s.ok()) return s;
    blocks_[last] = std::move(*own);
  }
  blocks_.reserve(static_cast<size_t>(blocks_of(n)));
  while (n_block() < blocks_of(n)) {
    Result<BlockPool::Block> block = pool_->take();
    if (!block.ok()) return block.status();
    blocks_.push_back(std::move(*block));
  }
  return {};
}

void BlockSequence::truncate(int64_t n) {
  if (n <= bad_) bad_ = -1;
  if (blocks_of(n) < n_block()) blocks_.resize(static_cast<size_t>(blocks_of(n)));
}

void BlockSequence::share(const BlockSequence& from, int64_t n) {
  std::vector<BlockPool::Block> blocks(from.blocks_.begin(), from.blocks_.begin() + blocks_of(n));
  blocks_.swap(blocks);
  bad_ = -1;
}

}  // namespace narrows
