// prefill_attend: exact causal attention of consecutive query rows of one head, online softmax over tiles of
// keys.
//
// For a block of kQueryBlock rows and each tile of kTile keys: scores = q k_t by the register block of
// gemm-inl.h, softmax step a row, out += weights v by the same block. Per score that is 2 head_dim FMAs
// against one exp, so the products set the pace. Tiles after the diagonal or before the window are not
// visited; tiles on either edge only for the rows that see part of them, and only these tiles are masked.
#include "kernels/prefill_block.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/prefill_attend.cpp"
#include <hwy/foreach_target.h>

#include "kernels/gemm-inl.h"
#include "kernels/softmax-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

HWY_INLINE void scale_row(const float* from, int64_t n, float factor, float* to) {
  const DF d;
  const VF f = hn::Set(d, factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, from + i), f), d, to + i);
  if (i < n) store_n(hn::Mul(load_n(d, from + i, n - i), f), d, to + i, n - i);
}

struct Keys {
  const float* k_t;
  int64_t ld_tile;
  const float* v;
  int64_t ldv;
};

/// Rows [row, row + n_row) of the call, n_row <= kQueryBlock.
void attend_block(const float* q, int64_t ldq, int64_t n_row, int64_t head_dim, const Keys& keys,
                  int64_t first, int64_t window, float scale, float* out, int64_t ldo, float* scratch) {
  const DF d;
  const PrefillScratch at(head_dim);
  float* q_scaled = scratch + at.q;
  float* sum_v = scratch + at.out;
  float* score = scratch + at.score;
  float* value = scratch + at.value;
  float* sum = scratch + at.sum;
  float* max = scratch + at.max;
  for (int64_t r = 0; r < n_row; ++r) {
    scale_row(q + r * ldq, head_dim, scale, q_scaled + r * head_dim);
    std::memset(sum_v + r * head_dim, 0, static_cast<size_t>(head_dim) * sizeof(float));
    hn::StoreU(hn::Zero(d), d, sum + r * kMaxLanes);
    max[r] = kMinusInfinity;
  }
  // Row r sees keys [begin(r), first + r].
  const auto begin = [first, window](int64_t r) {
    return window > 0 && first + r >= window ? first + r + 1 - window : 0;
  };
  const int64_t n_key = first + n_row;  // seen by any row of the block
  for (int64_t tile = begin(0) / kTile; tile * kTile < n_key; ++tile) {
    const int64_t key = tile * kTile;
    const int64_t key_end = key + kTile < n_key ? key + kTile : n_key;
    // Rows that see any of the tile: not before its first key, not with a window that begins after its last.
    const int64_t r0 = key > first ? key - first : 0;
    int64_t r1 = n_row;
    if (window > 0 && key_end - 1 + window - first < r1) r1 = key_end - 1 + window - first;
    if (r0 >= r1) continue;
    product(r1 - r0, kTile, head_dim, q_scaled + r0 * head_dim, head_dim, keys.k_t + tile * keys.ld_tile,
            kTile, score + r0 * kTile, kTile, false);
    const bool whole = first + r0 >= key + kTile - 1 && begin(r1 - 1) <= key;
    for (int64_t r = r0; r < r1; ++r) {
      float* s = score + r * kTile;
      if (!whole) {
        const int64_t from = begin(r) - key;
        const int64_t to = first + r + 1 - key;
        for (int64_t j = 0; j < from; ++j) s[j] = kMinusInfinity;
        for (int64_t j = to; j < kTile; ++j) s[j] = kMinusInfinity;
      }
      VF row_sum = hn::LoadU(d, sum + r * kMaxLanes);
      const float keep = softmax_step(s, max[r], row_sum);
      hn::StoreU(row_sum, d, sum + r * kMaxLanes);
      if (keep != 1.0F) scale_row(sum_v + r * head_dim, head_dim, keep, sum_v + r * head_dim);
    }
    // Only values that some row sees are read: those before every window may be gone from the cache.
    const int64_t skip = begin(r0) > key ? begin(r0) - key : 0;
    const int64_t n_value = key_end - key - skip;
    const float* v = keys.v + (key + skip) * keys.ldv;
    int64_t ldv = keys.ldv;
    if (ldv != head_dim) {  // packed, because rows 4 KB apart share a handful of cache sets
      for (int64_t j = 0; j < n_value; ++j) {
        std::memcpy(value + j * head_dim, v + j * ldv, static_cast<size_t>(head_dim) * sizeof(float));
      }
      v = value;
      ldv = head_dim;
    }
    product(r1 - r0, head_dim, n_value, score + r0 * kTile + skip, kTile, v, ldv, sum_v + r0 * head_dim,
            head_dim, true);
  }
  for (int64_t r = 0; r < n_row; ++r) {
    const float total = hn::GetLane(hn::SumOfLanes(d, hn::LoadU(d, sum + r * kMaxLanes)));
    // 0: every key had score -infinity. NaN passes through.
    scale_row(sum_v + r * head_dim, head_dim, total == 0 ? 0.0F : 1.0F / total, out + r * ldo);
  }
}

}  // namespace

void prefill_attend(const float* q, int64_t ldq, int64_t n_row, int64_t head_dim, const float* k_t,
                    int64_t ld_tile, const float* v, int64_t ldv, int64_t first, int64_t window, float scale,
                    float* out, int64_t ldo, float* scratch) {
  const Keys keys = {k_t, ld_tile, v, ldv};
  for (int64_t r = 0; r < n_row; r += kQueryBlock) {
    const int64_t rows = n_row - r < kQueryBlock ? n_row - r : kQueryBlock;
    attend_block(q + r * ldq, ldq, rows, head_dim, keys, first + r, window, scale, out + r * ldo, ldo,
                 scratch);
  }
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
