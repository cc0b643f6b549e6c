// Exact top-k and what is kept from step to step, by one block for one list of tokens. Keys are 32-bit,
// larger is better, 0: never. A first histogram over 4096 bins that the caller's function draws (any monotone
// one; fine where the threshold is expected) leaves few tokens undecided, and three more over the digits of
// their keys find the threshold to the last bit.
#pragma once

#include <cstdint>

#include "exec/cuda/arguments.h"

namespace narrows::cuda {

inline constexpr int kSelectThreads = 512;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kBins = kSelectBins;

/// So many tokens that one bin leaves undecided are compared with each other directly.
inline constexpr uint32_t kFew = kSelectFew;
static_assert(kFew == 2 * kSelectThreads);

struct SelectShared {
  alignas(16) uint32_t hist[kBins];
  uint32_t mass[256];
  uint32_t warp[kSelectWarps + 1];
  uint32_t warp2[kSelectWarps + 1];
  uint32_t found, above, total;
  float value[4];
};

/// Sum of x over lower threads of the block; total of all in *total. Two barriers.
__device__ inline uint32_t scan_block(uint32_t x, uint32_t* warp_sums, uint32_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = x;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t other = __shfl_up_sync(~0U, sum, i);
    if (lane >= i) sum += other;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  uint32_t before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kSelectWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    all += warp_sums[w];
  }
  *total = all;
  return before + sum - x;
}

/// The bin, from the top, in which the want-th largest lies (found), and how many are in higher ones (above).
/// There are as many.
template <int kN>
__device__ inline void find_bin(SelectShared& s, uint32_t want) {
  constexpr int kEach = kN / kSelectThreads;
  const int top = kN - 1 - static_cast<int>(threadIdx.x) * kEach;
  uint32_t own[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += own[i] = s.hist[top - i];
  uint32_t total = 0;
  uint32_t before = scan_block(sum, s.warp, &total);
  if (before < want && before + sum >= want) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (before < want && before + own[i] >= want) {
        s.found = static_cast<uint32_t>(top - i);
        s.above = before;
      }
      before += own[i];
    }
  }
  __syncthreads();
}

/// What to take: keys above `key`, and the first n_equal of those that equal it.
struct Threshold {
  uint32_t key, n_equal;
};

/// The want-th largest of the keys in bin `first`, which are many: three passes over all keys.
template <class Bin>
__device__ inline Threshold by_digits(SelectShared& s, const uint32_t* key, int n, uint32_t want,
                                      uint32_t first, const Bin& bin) {
  uint32_t prefix = 0, mask = 0;
  constexpr int kShift[3] = {21, 10, 0};
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
    __syncthreads();
    for (int i = threadIdx.x; i < 2048; i += kSelectThreads) s.hist[i] = 0;
    __syncthreads();
    const uint32_t digit = pass == 2 ? 1023U : 2047U;
    for (int i = threadIdx.x; i < n; i += kSelectThreads) {
      const uint32_t k = key[i];
      if (k != 0 && (k & mask) == prefix && bin(k) == first)
        atomicAdd(&s.hist[k >> kShift[pass] & digit], 1U);
    }
    __syncthreads();
    find_bin<2048>(s, want);
    want -= s.above;
    prefix |= s.found << kShift[pass];
    mask |= digit << kShift[pass];
  }
  return {prefix, want};
}

/// The count-th largest of key [n] (count of them or more are not 0), whose histogram over bin() is in
/// s.hist.
template <class Bin>
__device__ inline Threshold find_threshold(SelectShared& s, const uint32_t* key, int n, uint32_t count,
                                           const Bin& bin) {
  find_bin<kBins>(s, count);
  const uint32_t first = s.found;
  const uint32_t want = count - s.above;
  const uint32_t n_few = s.hist[first];
  if (n_few <= kFew) {
    if (threadIdx.x == 0) s.total = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kSelectThreads) {
      const uint32_t k = key[i];
      if (k != 0 && bin(k) == first)
        s.hist[atomicAdd(&s.total, 1U)] = k;  // in any order: the histogram has served
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n_few; i += kSelectThreads) {
      const uint32_t own = s.hist[i];
      uint32_t above = 0, equal = 0;
      for (uint32_t j = 0; j < n_few; ++j) {
        above += s.hist[j] > own;
        equal += s.hist[j] == own;
      }
      if (above < want && above + equal >= want) {  // equals write the same
        s.found = own;
        s.above = want - above;
      }
    }
    __syncthreads();
    return {s.found, s.above};
  }
  return by_digits(s, key, n, want, first, bin);
}

/// Writes the indices of what `t` takes, ascending; returns how many (at most `room` are written). A warp has
/// a run of keys.
__device__ inline uint32_t take(SelectShared& s, const uint32_t* key, int n, Threshold t, int32_t* selected,
                                uint32_t room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int run = ((n + kSelectThreads - 1) / kSelectThreads) * 32;
  const int begin = min(n, warp * run), end = min(n, begin + run);
  uint32_t above = 0, equal = 0;
  for (int i = begin + lane; i < end; i += 32) {
    above += key[i] > t.key;
    equal += key[i] == t.key;
  }
  above = __reduce_add_sync(~0U, above);
  equal = __reduce_add_sync(~0U, equal);
  __syncthreads();
  if (lane == 0) {
    s.warp[warp] = above;
    s.warp2[warp] = equal;
  }
  __syncthreads();
  uint32_t at = 0, equal_before = 0, total = 0, all_equal = 0;
#pragma unroll
  for (int w = 0; w < kSelectWarps; ++w) {
    const uint32_t taken = all_equal < t.n_equal ? min(s.warp2[w], t.n_equal - all_equal) : 0;
    if (w < warp) at += s.warp[w] + taken;
    if (w < warp) equal_before += s.warp2[w];
    total += s.warp[w] + taken;
    all_equal += s.warp2[w];
  }
  for (int base = begin; base < end; base += 32) {
    const int i = base + lane;
    const uint32_t k = i < end ? key[i] : 0;
    const bool is_equal = i < end && k == t.key;
    const uint32_t equals = __ballot_sync(~0U, is_equal);
    const uint32_t lower = (1U << lane) - 1;
    const bool taken =
        (i < end && k > t.key) || (is_equal && equal_before + __popc(equals & lower) < t.n_equal);
    const uint32_t takes = __ballot_sync(~0U, taken);
    const uint32_t to = at + __popc(takes & lower);
    if (taken && to < room) selected[to] = i;
    at += __popc(takes);
    equal_before += __popc(equals);
  }
  return min(total, room);
}

/// Gives the selected tokens [n] rows of what is kept: slot [n]; those that were not held are listed in
/// missing (indices into the selected, ascending); returns how many. Who is not selected now leaves, in turn.
/// used: a bit a row, shared.
__device__ inline uint32_t hold(SelectShared& s, const int32_t* selected, uint32_t n, uint16_t* slot,
                                int32_t* missing, int32_t* token_of, uint16_t* slot_of, uint32_t* hand,
                                int capacity, uint32_t* used) {
  for (int i = threadIdx.x; i < (capacity + 31) / 32; i += kSelectThreads) used[i] = 0;
  __syncthreads();
  uint32_t n_missing = 0;
  for (uint32_t base = 0; base < n; base += kSelectThreads) {
    const uint32_t i = base + threadIdx.x;
    uint16_t row = 0;
    if (i < n) {
      row = slot_of[selected[i]];
      slot[i] = row;
      if (row != 0xFFFF) atomicOr(&used[row / 32], 1U << row % 32);
    }
    const bool is_missing = row == 0xFFFF;
    uint32_t total = 0;
    const uint32_t at = scan_block(is_missing ? 1 : 0, s.warp, &total);
    if (is_missing) missing[n_missing + at] = static_cast<int32_t>(i);
    n_missing += total;
  }
  __syncthreads();
  const uint32_t from = *hand;
  uint32_t given = 0;
  for (uint32_t base = 0; base < static_cast<uint32_t>(capacity) && given < n_missing;
       base += kSelectThreads) {
    const uint32_t j = base + threadIdx.x;
    const uint32_t row = (from + j) % static_cast<uint32_t>(capacity);
    const bool is_free = j < static_cast<uint32_t>(capacity) && (used[row / 32] >> row % 32 & 1) == 0;
    uint32_t total = 0;
    const uint32_t at = given + scan_block(is_free ? 1 : 0, s.warp, &total);
    if (is_free && at < n_missing) {
      const int32_t i = missing[at];
      if (token_of[row] >= 0) slot_of[token_of[row]] = 0xFFFF;
      token_of[row] = selected[i];
      slot_of[selected[i]] = static_cast<uint16_t>(row);
      slot[i] = static_cast<uint16_t>(row);
      if (at == n_missing - 1) *hand = (row + 1) % static_cast<uint32_t>(capacity);
    }
    given += total;
  }
  return n_missing;
}

}  // namespace narrows::cuda
