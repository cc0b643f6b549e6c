// Tasks are blocks of kQueryRows rows of one query head. Heads that share keys follow each other, so that two
// threads read the same tiles; within them the rows that see most come first, so that the last tasks are
// small.
#include "prefill/attention.h"

#include <algorithm>
#include <bit>

namespace narrows {

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

}  // namespace

PrefillKind attention_kind(PrefillAttention attention) {
  if (attention == PrefillAttention::automatic) return kernels::ops().best_prefill;
  return static_cast<PrefillKind>(static_cast<int>(attention) - 1);
}

PromptAttention::PromptAttention(PrefillKind kind, const AttentionSizes& sizes, int64_t n_token,
                                 int n_threads)
    : kernel_(*kernels::ops().prefill[static_cast<int>(kind)]),
      sizes_(sizes),
      n_tile_(tiles(n_token)),
      tiles_(sizes.n_head_kv * n_tile_ * kernel_.tile_bytes(sizes.head_dim)) {
  for (int i = 0; i < n_threads; ++i) scratch_.emplace_back(kernel_.scratch_bytes(sizes.head_dim));
}

bool PromptAttention::ok() const {
  return tiles_.ok() && std::all_of(scratch_.begin(), scratch_.end(), [](const auto& s) { return s.ok(); });
}

int64_t PromptAttention::bytes_needed(PrefillKind kind, const AttentionSizes& sizes, int64_t n_token,
                                      int n_threads) {
  const kernels::PrefillKernel& kernel = *kernels::ops().prefill[static_cast<int>(kind)];
  return sizes.n_head_kv * tiles(n_token) * kernel.tile_bytes(sizes.head_dim) +
         n_threads * kernel.scratch_bytes(sizes.head_dim);
}

void PromptAttention::pack(int64_t head_kv, int64_t t, const float* k, const float* v, int64_t n) {
  const int64_t at = head_kv * sizes_.head_dim;
  kernel_.pack(k + at, sizes_.width(), v + at, sizes_.width(), n, sizes_.head_dim, sizes_.scale,
               tile(head_kv, t));
}

void PromptAttention::start(const float* q, int64_t n, int64_t first, float* out) {
  q_ = q;
  n_ = n;
  first_ = first;
  out_ = out;
  next_task_ = 0;
  non_finite_ = false;
}

void PromptAttention::run(int ith) {
  const int64_t blocks = (n_ + kQueryRows - 1) / kQueryRows, group = sizes_.n_head / sizes_.n_head_kv;
  const int64_t ld = sizes_.n_head * sizes_.head_dim, tasks = sizes_.n_head * blocks;
  for (int64_t task = next_task_++; task < tasks; task = next_task_++) {
    const int64_t head_kv = task / (group * blocks), rest = task % (group * blocks);
    const int64_t head = head_kv * group + rest % group, row = (blocks - 1 - rest / group) * kQueryRows;
    kernels::PrefillRows rows;
    rows.q = q_ + row * ld + head * sizes_.head_dim;
    rows.ldq = ld;
    rows.n_row = std::min(kQueryRows, n_ - row);
    rows.head_dim = sizes_.head_dim;
    rows.tiles = tile(head_kv, 0);
    rows.end = first_ + n_;
    rows.first = first_ + row;
    rows.scale = sizes_.scale;
    rows.out = out_ + row * ld + head * sizes_.head_dim;
    rows.ldo = ld;
    rows.scratch = scratch_[static_cast<size_t>(ith)].data();
    kernel_.attend(rows);
    if (!all_finite(rows)) non_finite_ = true;
  }
}

}  // namespace narrows
