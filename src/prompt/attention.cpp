// Tasks are blocks of kQueryRows rows of one query head. Heads that share keys follow each other, so that two
// threads read the same tiles; within them the rows that see most come first, so that the last tasks are
// small.
//
// A sparse prompt (docs/sparse_prefill.md): each head's sample of rows finds exactly how much of its
// attention falls on each tile of keys; the rows around them then read the tiles that hold most of it, the
// first one (attention sinks) and their own neighbourhood.
#include "prompt/attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

namespace narrows {

using kernels::kLookRows;
using kernels::kPrefillTile;
using kernels::kQueryRows;
using kernels::PrefillKind;

namespace {

bool all_finite(const kernels::PrefillRows& rows) {
  constexpr uint32_t kExponent = 0x7F800000;
  uint32_t bad = 0;  // no early way out, so that the compiler makes vectors of it
  for (int64_t r = 0; r < rows.n_row; ++r) {
    const float* out = rows.out + r * rows.ldo;
    for (int64_t c = 0; c < rows.head_dim; ++c)
      bad |= static_cast<uint32_t>((std::bit_cast<uint32_t>(out[c]) & kExponent) == kExponent);
  }
  return bad == 0;
}

/// Divides sums of values by those of their weights, to which the sink adds one.
void divide_with_sink(const kernels::PrefillRows& rows, float sink) {
  for (int64_t r = 0; r < rows.n_row; ++r) {
    const float top = std::fmax(rows.max[r], sink), own = std::exp(rows.max[r] - top);
    const float factor = rows.sum[r] == 0 ? 0.0F : own / (own * rows.sum[r] + std::exp(sink - top));
    float* out = rows.out + r * rows.ldo;
    for (int64_t c = 0; c < rows.head_dim; ++c) out[c] *= factor;
  }
}

}  // namespace

PrefillKind attention_kind(PrefillAttention attention) {
  if (attention == PrefillAttention::automatic) return kernels::ops().best_prefill;
  return static_cast<PrefillKind>(static_cast<int>(attention) - 1);
}

bool can_be_sparse(PrefillAttention attention) {
  return kernels::ops().prefill[static_cast<int>(attention_kind(attention))]->look != nullptr;
}

PromptAttention::PromptAttention(PrefillKind kind, const AttentionSizes& sizes, int64_t n_token,
                                 int n_threads, double mass)
    : kernel_(*kernels::ops().prefill[static_cast<int>(kind)]),
      sizes_(sizes),
      n_tile_(tiles(n_token)),
      tiles_(sizes.n_head_kv * n_tile_ * kernel_.tile_bytes(sizes.head_dim)),
      mass_(mass),
      share_(mass < 1 ? sizes.n_head * n_tile_ * kLookRows : 0),
      skip_(mass < 1 ? sizes.n_head * kMaxBlocks * n_tile_ : 0) {
  for (int i = 0; i < n_threads; ++i) scratch_.emplace_back(kernel_.scratch_bytes(sizes.head_dim));
}

bool PromptAttention::ok() const {
  return tiles_.ok() && share_.ok() && skip_.ok() &&
         std::all_of(scratch_.begin(), scratch_.end(), [](const auto& s) { return s.ok(); });
}

int64_t PromptAttention::bytes_needed(PrefillKind kind, const AttentionSizes& sizes, int64_t n_token,
                                      int n_threads, double mass) {
  const kernels::PrefillKernel& kernel = *kernels::ops().prefill[static_cast<int>(kind)];
  const int64_t choice = kLookRows * static_cast<int64_t>(sizeof(float)) + kMaxBlocks;
  return tiles(n_token) *
             (sizes.n_head_kv * kernel.tile_bytes(sizes.head_dim) + (mass < 1 ? sizes.n_head * choice : 0)) +
         n_threads * kernel.scratch_bytes(sizes.head_dim);
}

void PromptAttention::pack(int64_t head_kv, int64_t t, const float* k, const float* v, int64_t n) {
  const int64_t at = head_kv * sizes_.head_dim;
  kernel_.pack(k + at, sizes_.width(), v + at, sizes_.width(), n, sizes_.head_dim, sizes_.scale,
               tile(head_kv, t));
}

void PromptAttention::start(const float* q, int64_t n, int64_t first, int64_t window, float* out,
                            const float* sinks) {
  q_ = q;
  n_ = n;
  first_ = first;
  window_ = window;
  out_ = out;
  sinks_ = sinks;
  sparse_ = is_sparse(n, first, window);
  next_task_ = next_choice_ = 0;
  non_finite_ = false;
}

bool PromptAttention::is_sparse(int64_t n, int64_t first, int64_t window) const {
  // Below, and for the last rows of a prompt, looking costs what it could save.
  constexpr int64_t kDenseTiles = 8;
  return mass_ < 1 && window == 0 && n >= kQueryRows && n <= kMaxBlocks * kQueryRows &&
         first >= kDenseTiles * kPrefillTile;
}

kernels::PrefillRows PromptAttention::rows_of(int64_t head, int64_t row, int ith) {
  const int64_t ld = sizes_.n_head * sizes_.head_dim;
  kernels::PrefillRows rows;
  rows.q = q_ + row * ld + head * sizes_.head_dim;
  rows.ldq = ld;
  rows.head_dim = sizes_.head_dim;
  rows.tiles = tile(head / (sizes_.n_head / sizes_.n_head_kv), 0);
  rows.end = first_ + n_;
  rows.first = first_ + row;
  rows.window = window_;
  rows.scale = sizes_.scale;
  rows.scratch = scratch_[static_cast<size_t>(ith)].data();
  return rows;
}

void PromptAttention::choose(int ith) {
  for (int64_t head = next_choice_++; head < sizes_.n_head; head = next_choice_++) {
    kernels::PrefillRows rows = rows_of(head, 0, ith);
    rows.ldq *= kSampleStep;
    rows.n_row = (n_ + kSampleStep - 1) / kSampleStep;
    rows.step = kSampleStep;
    kernel_.look(rows, share(head));
    for (int64_t block = 0; block * kQueryRows < n_; ++block) choose_block(head, block);
  }
}

void PromptAttention::choose_block(int64_t head, int64_t block) {
  constexpr int64_t kSample = kQueryRows / kSampleStep;
  const int64_t row = block * kQueryRows, from = block * kSample;
  const int64_t to = std::min(from + kSample, (n_ + kSampleStep - 1) / kSampleStep);
  const int64_t n_tile = tiles(first_ + std::min(row + kQueryRows, n_)),
                near = (first_ + row) / kPrefillTile - 1;
  uint8_t* const skips = skip(head, block);
  std::fill_n(skips, n_tile, uint8_t{0});

  std::vector<double> mean(static_cast<size_t>(n_tile));
  for (int64_t t = 0; t < n_tile; ++t) {
    const float* at = share(head) + t * kLookRows;
    mean[static_cast<size_t>(t)] = std::accumulate(at + from, at + to, 0.0) / static_cast<double>(to - from);
  }
  // NaN in one share is in all of its row: everything is read, and attention says what is wrong.
  const double total = std::accumulate(mean.begin(), mean.end(), 0.0);
  std::vector<int64_t> far(static_cast<size_t>(near - 1));
  std::iota(far.begin(), far.end(), int64_t{1});
  double kept = total;
  for (const int64_t t : far) kept -= mean[static_cast<size_t>(t)];
  int64_t n_read = n_tile;
  if (total > 0) {
    std::sort(far.begin(), far.end(), [&](int64_t a, int64_t b) {
      const double x = mean[static_cast<size_t>(a)], y = mean[static_cast<size_t>(b)];
      return x != y ? x > y : a > b;
    });
    for (const int64_t t : far) {
      if (kept >= mass_ * total) {
        skips[t] = 1;
        --n_read;
      }
      kept += mean[static_cast<size_t>(t)];
    }
  }
  tiles_seen_ += n_tile;
  tiles_read_ += n_read;
}

void PromptAttention::run(int ith) {
  const int64_t blocks = (n_ + kQueryRows - 1) / kQueryRows, group = sizes_.n_head / sizes_.n_head_kv;
  const int64_t ld = sizes_.n_head * sizes_.head_dim, tasks = sizes_.n_head * blocks;
  for (int64_t task = next_task_++; task < tasks; task = next_task_++) {
    const int64_t head_kv = task / (group * blocks), rest = task % (group * blocks);
    const int64_t head = head_kv * group + rest % group, row = (blocks - 1 - rest / group) * kQueryRows;
    kernels::PrefillRows rows = rows_of(head, row, ith);
    rows.n_row = std::min(kQueryRows, n_ - row);
    if (sparse_) rows.skip = skip(head, row / kQueryRows);
    rows.out = out_ + row * ld + head * sizes_.head_dim;
    rows.ldo = ld;
    float max[kQueryRows], sum[kQueryRows];
    if (sinks_ != nullptr) {
      rows.max = max;
      rows.sum = sum;
    }
    kernel_.attend(rows);
    if (sinks_ != nullptr) divide_with_sink(rows, sinks_[head]);
    if (!all_finite(rows)) non_finite_ = true;
  }
}

}  // namespace narrows
