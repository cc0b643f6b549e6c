// The last step of an exact top-k that many blocks share: bins of a histogram say which tokens are taken for
// sure and which bin has to be divided; blocks mark the former in a mask and list the latter, and the last
// block of a list ranks those, writes indices in order and gives the chosen tokens their rows among what is
// kept. Every loop over more than a block's threads is one over words of bits, so that few barriers are left.
#pragma once

#include "exec/cuda/select.cuh"

namespace narrows::cuda {

/// What a list's histogram decided: all of the bins above `first` are taken, and the best `want` of that bin.
struct Decision {
  int32_t first;  ///< -1: all that may be; kBins: none
  uint32_t want;
  uint32_t n_few;  ///< of the bin, listed so far
  uint32_t unused;
};
static_assert(sizeof(Decision) == 16);

/// A list's share of the work space.
struct ChooseList {
  Decision* decision;
  uint32_t* keys;   ///< [n]
  uint32_t* taken;  ///< a bit a token
  uint2* few;       ///< [kFew]: key, token
  uint16_t* rows;   ///< [max_budget]: rows that are free
};

/// Tokens [begin, end) of a list (begin a multiple of 32): marks in the mask, few in the list.
template <class Bin>
__device__ inline void mark(const ChooseList& list, const Decision& decision, int begin, int end,
                            const Bin& bin) {
  constexpr int kAhead = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int base = begin + warp * 32 * kAhead; base < end; base += kSelectThreads * kAhead) {
    uint32_t key[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int t = base + k * 32 + lane;
      key[k] = t < end ? __ldcg(list.keys + t) : 0;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int t = base + k * 32 + lane;
      if (base + k * 32 >= end) break;
      const int own = key[k] != 0 ? static_cast<int>(bin(key[k])) : -1;
      const uint32_t above = __ballot_sync(~0U, own > decision.first);
      const bool is_few = decision.want > 0 && own == decision.first;
      const uint32_t few = __ballot_sync(~0U, is_few);
      if (lane == 0) __stcg(list.taken + t / 32, above);
      if (few == 0) continue;
      uint32_t at = 0;
      if (lane == 0) at = atomicAdd(&list.decision->n_few, static_cast<uint32_t>(__popc(few)));
      at = __shfl_sync(~0U, at, 0) + __popc(few & ((1U << lane) - 1));
      if (is_few && at < kFew) __stcg(list.few + at, make_uint2(key[k], static_cast<uint32_t>(t)));
    }
  }
}

/// Of the few, the best `want` are marked: by key, then the oldest. One block. Bins between their lowest and
/// highest key leave next to none to be compared with each other.
__device__ inline void rank_few(SelectShared& s, const ChooseList& list, uint32_t n_few, uint32_t want) {
  constexpr uint32_t kN = 1024;
  static_assert(kFew <= kN && 3 * kN <= kBins);
  uint32_t *token = s.hist + kN, *few_key = s.hist + 2 * kN;
  __shared__ uint32_t low, high, n_left;
  constexpr int kEach = static_cast<int>(kFew) / kSelectThreads;
  uint2 own[kEach];
  if (threadIdx.x == 0) low = ~0U, high = 0, n_left = 0;
  for (int i = threadIdx.x; i < static_cast<int>(kN); i += kSelectThreads) s.hist[i] = 0;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const uint32_t i = threadIdx.x + k * kSelectThreads;
    own[k] = i < n_few ? __ldcg(list.few + i) : make_uint2(0, 0);
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const bool is = threadIdx.x + k * kSelectThreads < n_few;
    const uint32_t least = __reduce_min_sync(~0U, is ? own[k].x : ~0U),
                   most = __reduce_max_sync(~0U, own[k].x);
    if (threadIdx.x % 32 == 0) atomicMin(&low, least), atomicMax(&high, most);
  }
  __syncthreads();
  const uint32_t from = low;
  const int shift = max(0, 32 - __clz(high - from) - 10);  // so that all differences are below kN
  uint32_t bin[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    bin[k] = (own[k].x - from) >> shift;
    if (threadIdx.x + k * kSelectThreads < n_few) atomicAdd(&s.hist[bin[k]], 1U);
  }
  __syncthreads();
  find_bin<kN>(s, want);
  const uint32_t first = s.found, rest = want - s.above;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (threadIdx.x + k * kSelectThreads >= n_few) break;
    if (bin[k] > first) atomicOr(list.taken + own[k].y / 32, 1U << own[k].y % 32);
    if (bin[k] != first) continue;
    const uint32_t at = atomicAdd(&n_left, 1U);
    token[at] = own[k].y;
    few_key[at] = own[k].x;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n_left; i += kSelectThreads) {
    const uint32_t key = few_key[i], t = token[i];
    uint32_t before = 0;
    for (uint32_t j = 0; j < n_left; ++j) before += few_key[j] > key || (few_key[j] == key && token[j] < t);
    if (before < rest) atomicOr(list.taken + t / 32, 1U << t % 32);
  }
  __syncthreads();
}

/// The indices of the set bits [0, n_bit), ascending, given to each(index, bit); returns how many. One block;
/// word(i) is read twice.
template <class Word, class Each>
__device__ inline uint32_t expand(SelectShared& s, int n_bit, const Word& word, const Each& each) {
  const int n_word = (n_bit + 31) / 32, run = (n_word + kSelectThreads - 1) / kSelectThreads;
  const int begin = min(n_word, static_cast<int>(threadIdx.x) * run), end = min(n_word, begin + run);
  uint32_t own = 0, total = 0;
  for (int i = begin; i < end; ++i) own += __popc(word(i));
  uint32_t at = scan_block(own, s.warp, &total);
  for (int i = begin; i < end; ++i) {
    for (uint32_t bits = word(i); bits != 0; bits &= bits - 1) each(at++, 32 * i + __ffs(bits) - 1);
  }
  return total;
}

/// Rows of what is kept for the selected tokens [n], as hold() of select.cuh gives them. used: a bit a row,
/// shared.
__device__ inline uint32_t keep(SelectShared& s, const int32_t* selected, uint32_t n, uint16_t* slot,
                                int32_t* missing, uint16_t* rows, int32_t* token_of, uint16_t* slot_of,
                                uint32_t* hand, int capacity, uint32_t* used) {
  constexpr int kAhead = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_used = (capacity + 31) / 32;
  uint32_t* lacks = s.hist;  // a bit a selected token
  for (int i = threadIdx.x; i < n_used; i += kSelectThreads) used[i] = 0;
  __syncthreads();
  for (uint32_t base = warp * 32 * kAhead; base < n; base += kSelectThreads * kAhead) {
    int32_t token[kAhead];
    uint16_t row[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) token[k] = selected[min(base + k * 32 + lane, n - 1)];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) row[k] = slot_of[token[k]];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const uint32_t i = base + k * 32 + lane;
      if (base + k * 32 >= n) break;
      const bool is_missing = i < n && row[k] == 0xFFFF;
      if (i < n && !is_missing) {
        slot[i] = row[k];
        atomicOr(&used[row[k] / 32], 1U << row[k] % 32);
      }
      const uint32_t bits = __ballot_sync(~0U, is_missing);
      if (lane == 0) lacks[i / 32] = bits;
    }
  }
  __syncthreads();
  const uint32_t n_missing = expand(
      s, static_cast<int>(n), [&](int i) { return lacks[i]; }, [&](uint32_t at, int i) { missing[at] = i; });
  if (n_missing == 0) return 0;
  // Free rows, in turn from the hand on.
  const uint32_t from = *hand;
  const auto free_word = [&](int i) {
    const int left = capacity - 32 * i;
    return ~used[i] & (left < 32 ? (1U << left) - 1 : ~0U);
  };
  __shared__ uint32_t before_hand;
  const int n_word = n_used, run = (n_word + kSelectThreads - 1) / kSelectThreads;
  const int begin = min(n_word, static_cast<int>(threadIdx.x) * run), end = min(n_word, begin + run);
  uint32_t own = 0, n_free = 0;
  for (int i = begin; i < end; ++i) own += __popc(free_word(i));
  const uint32_t first = scan_block(own, s.warp, &n_free);
  {
    uint32_t at = first;
    const int of_hand = static_cast<int>(from / 32);
    for (int i = begin; i < end; ++i) {
      const uint32_t bits = free_word(i);
      if (i == of_hand) before_hand = at + __popc(bits & ((1U << from % 32) - 1));
      at += __popc(bits);
    }
  }
  __syncthreads();
  uint32_t at = first;
  for (int i = begin; i < end; ++i) {
    for (uint32_t bits = free_word(i); bits != 0; bits &= bits - 1, ++at) {
      const uint32_t rank = at >= before_hand ? at - before_hand : at + n_free - before_hand;
      if (rank < n_missing) rows[rank] = static_cast<uint16_t>(32 * i + __ffs(bits) - 1);
    }
  }
  __syncthreads();
  for (uint32_t base = threadIdx.x; base < n_missing; base += kSelectThreads * kAhead) {
    uint16_t row[kAhead];
    int32_t of[kAhead], token[kAhead], old[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const uint32_t r = min(base + k * kSelectThreads, n_missing - 1);
      row[k] = rows[r];
      of[k] = missing[r];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      token[k] = selected[of[k]];
      old[k] = token_of[row[k]];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const uint32_t r = base + k * kSelectThreads;
      if (r >= n_missing) break;
      if (old[k] >= 0) slot_of[old[k]] = 0xFFFF;
      token_of[row[k]] = token[k];
      slot_of[token[k]] = row[k];
      slot[of[k]] = row[k];
      if (r == n_missing - 1) *hand = (row[k] + 1U) % static_cast<uint32_t>(capacity);
    }
  }
  return n_missing;
}

/// Is this block the last of n_block of a list to come here? What the others wrote before is seen then. The
/// counter is zero again for the next use.
__device__ inline bool is_last_of(uint32_t* counter, uint32_t n_block) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(counter, 1U) == n_block - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

}  // namespace narrows::cuda
