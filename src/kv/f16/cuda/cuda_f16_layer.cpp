#include "kv/f16/cuda/cuda_f16_layer.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kv/window/exact_store.h"

namespace narrows {

using device::kBlockTokens;
using kernels::f16_t;
using kernels::ops;

static_assert(kBlockTokens == kDenseBlock);

namespace {

/// Keys of a block between [head_dim, 64] a head, as the CPU has them, and [64, head_dim]; values are alike.
void transpose_keys(const AttentionShape& s, bool to_cpu, const f16_t* from, f16_t* to) {
  const int64_t hd = s.head_dim, half = s.width() * kBlockTokens;
  for (int64_t h = 0; h < s.n_head_kv; ++h) {
    const int64_t at = h * hd * kBlockTokens;
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      for (int64_t c = 0; c < hd; ++c) {
        const int64_t row = at + t * hd + c, column = at + c * kBlockTokens + t;
        to[to_cpu ? column : row] = from[to_cpu ? row : column];
      }
    }
  }
  std::copy_n(from + half, half, to + half);
}

}  // namespace

void CudaF16Layer::fetch(int64_t b, f16_t* to) const {
  const BlockPool& pool = blocks_->pool();
  const int64_t bytes = pool.block_bytes();
  Result<std::unique_ptr<device::Stream>> stream = pool.make_stream();
  if (stream.ok()) (*stream)->download(to, pool.layer(index_) + blocks_->block(b) * bytes, bytes);
  if (stream.ok() && (*stream)->ok()) return;
  blocks_->note_lost();
  std::fill_n(to, halves(), f16_t{0xFFFF});
}

Status CudaF16Layer::put(int64_t b, const f16_t* from) {
  const BlockPool& pool = blocks_->pool();
  const int64_t bytes = pool.block_bytes();
  Result<std::unique_ptr<device::Stream>> stream = pool.make_stream();
  if (!stream.ok()) return stream.status();
  (*stream)->upload(pool.layer(index_) + blocks_->block(b) * bytes, from, bytes);
  (*stream)->wait();
  return (*stream)->take_error();
}

Status CudaF16Layer::append(const float* k, const float* v, int64_t n) {
  if (k != nullptr) {
    if (Status s = check_tokens(shape(), rope(), size_, k, v, n); !s.ok()) return s;
    if (Status s = blocks_->reserve(size_, size_ + n); !s.ok()) return s;
    const int64_t width = shape().width(), hd = shape().head_dim;
    std::vector<float> rotated(static_cast<size_t>(width));
    std::vector<f16_t> block(static_cast<size_t>(halves()));
    for (int64_t done = 0; done < n;) {
      const int64_t b = (size_ + done) / kBlockTokens, slot = (size_ + done) % kBlockTokens;
      const int64_t m = std::min(n - done, kBlockTokens - slot);
      fetch(b, block.data());
      for (int64_t t = 0; t < m; ++t) {
        rotate_keys(shape(), rope(), size_ + done + t, 1, false, k + (done + t) * width, rotated.data());
        for (int64_t h = 0; h < shape().n_head_kv; ++h) {
          f16_t* key = block.data() + (h * kBlockTokens + slot + t) * hd;
          ops().f32_to_f16(rotated.data() + h * hd, key, hd);
          ops().f32_to_f16(v + (done + t) * width + h * hd, key + width * kBlockTokens, hd);
        }
      }
      if (Status s = put(b, block.data()); !s.ok()) return s;
      done += m;
    }
  }
  if (k == nullptr && blocks_->bad_token() >= 0) return non_finite_token(blocks_->bad_token());
  size_ += n;
  return {};
}

Status CudaF16Layer::make_room(bool /*may_convert*/) {
  if (blocks_->bad_token() >= 0) return non_finite_token(blocks_->bad_token());
  return blocks_->reserve(size_, size_ + 1);
}

Status CudaF16Layer::begin_step(StepScratch& /*scratch*/) { return make_room(false); }

void CudaF16Layer::read(int64_t first, int64_t n, float* k, float* v) const {
  const int64_t width = shape().width(), hd = shape().head_dim;
  std::vector<f16_t> block(static_cast<size_t>(halves()));
  for (int64_t done = 0; done < n;) {
    const int64_t slot = (first + done) % kBlockTokens, m = std::min(n - done, kBlockTokens - slot);
    fetch((first + done) / kBlockTokens, block.data());
    for (int64_t t = 0; t < m; ++t) {
      for (int64_t h = 0; h < shape().n_head_kv; ++h) {
        const f16_t* key = block.data() + (h * kBlockTokens + slot + t) * hd;
        const int64_t to = (done + t) * width + h * hd;
        ops().f16_to_f32(key, k + to, hd);
        ops().f16_to_f32(key + width * kBlockTokens, v + to, hd);
      }
    }
    done += m;
  }
}

void CudaF16Layer::keep(int64_t n) {
  size_ = std::min(size_, n);
  // The blocks are all layers': the last one lets go.
  if (index_ == blocks_->pool().n_layer() - 1) blocks_->truncate(n);
}

Status CudaF16Layer::share(const KvLayer& from, int64_t n) {
  if (index_ == 0) blocks_->share(*static_cast<const CudaF16Layer&>(from).blocks_, n);
  size_ = n;
  return {};
}

void CudaF16Layer::save(SnapshotWriter& out) const {
  std::vector<f16_t> block(static_cast<size_t>(halves())), turned(block.size());
  out.number(size_);
  for (int64_t b = 0; b < ceil_div(size_, kBlockTokens); ++b) {
    fetch(b, block.data());
    transpose_keys(shape(), true, block.data(), turned.data());
    out.bytes(turned.data(), turned.size() * sizeof(f16_t));
  }
}

Status CudaF16Layer::load(SnapshotReader& in) {
  size_ = 0;
  const int64_t n = in.count(0, rope().n_ctx());
  const uint64_t bytes = static_cast<uint64_t>(halves()) * sizeof(f16_t);
  if (in.ok() && ceil_div(n, kBlockTokens) > static_cast<int64_t>(in.left() / bytes)) in.fail();
  if (!in.ok()) return not_a_layer(in);
  if (Status s = blocks_->reserve(0, n); !s.ok()) return s;
  std::vector<f16_t> block(static_cast<size_t>(halves())), saved(block.size());
  for (int64_t b = 0; b < ceil_div(n, kBlockTokens); ++b) {
    std::memcpy(saved.data(), in.take(bytes), bytes);  // nothing of a file is aligned
    transpose_keys(shape(), false, saved.data(), block.data());
    if (Status s = put(b, block.data()); !s.ok()) return s;
  }
  size_ = n;
  return {};
}

LayerBytes CudaF16Layer::bytes() const {
  return {.exact = blocks_->n_block() * blocks_->pool().block_bytes()};
}

}  // namespace narrows
