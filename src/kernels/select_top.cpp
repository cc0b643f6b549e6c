// select_top: indices of the `count` largest scores, ties to the lower index, ascending; exact and O(n).
//
// Floats become unsigned keys in the same order. The count-th largest key is found digit by digit from the
// top (11 + 11 + 10 bits): a histogram tells which bin holds it, and only the keys of that bin are looked at
// again. One pass in order then emits every index whose key is larger, and as many equal ones as are still
// due. Comparisons give 64 bits at a time, whose ones are walked; Highway's Compress is no faster on AVX-512
// and on AVX2 copies a table of 1 KB at each call (GCC 12).
#include <bit>

#include "kernels/select_scratch.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/select_top.cpp"
#include <hwy/foreach_target.h>

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

/// -0 becomes +0 by the addition: they are equal as scores, so they must be as keys.
HWY_INLINE VU order_key(VF score) {
  const DF d;
  const DI di;
  const DU du;
  const auto bits = hn::BitCast(di, hn::Add(score, hn::Zero(d)));
  const auto flip = hn::Or(hn::ShiftRight<31>(bits), hn::Set(di, static_cast<int32_t>(0x80000000U)));
  return hn::BitCast(du, hn::Xor(bits, flip));
}

/// Counts digit (key >> shift) & mask of all keys into bin [kSelectTables][mask + 1]. Neighbouring keys go to
/// different tables: scores cluster, and adding to a counter that was just written waits for that store.
HWY_INLINE void count_digits(const uint32_t* key, int64_t n, int shift, uint32_t mask, uint32_t* bin) {
  std::memset(bin, 0, sizeof(uint32_t) * kSelectTables * (mask + 1));
  int64_t i = 0;
  for (; i + kSelectTables <= n; i += kSelectTables) {
    for (int64_t t = 0; t < kSelectTables; ++t) ++bin[t * (mask + 1) + ((key[i + t] >> shift) & mask)];
  }
  for (; i < n; ++i) ++bin[(key[i] >> shift) & mask];
}

/// Lanes of a mask as bits, lane 0 lowest.
HWY_INLINE uint64_t mask_bits(DU d, hn::Mask<DU> mask) {
  uint8_t byte[8];  // the size StoreMaskBits asks for; it writes the bits of one vector
  hn::StoreMaskBits(d, mask, byte);
  if constexpr (kLanes == 16) {
    uint16_t bits = 0;
    std::memcpy(&bits, byte, sizeof(bits));
    return bits;
  } else {
    return byte[0];
  }
}

/// Which of key [64] equal `value` in the bits of `select`, a bit a key. Reads 64 keys.
HWY_INLINE uint64_t equal_bits(const uint32_t* key, uint32_t select, uint32_t value) {
  const DU d;
  uint64_t bits = 0;
  NARROWS_UNROLL
  for (int64_t i = 0; i < kSelectWord; i += kLanes) {
    const VU v = hn::And(hn::LoadU(d, key + i), hn::Set(d, select));
    bits |= mask_bits(d, hn::Eq(v, hn::Set(d, value))) << i;
  }
  return bits;
}

/// Which of key [64] are above `value`, a bit a key.
HWY_INLINE uint64_t above_bits(const uint32_t* key, uint32_t value) {
  const DU d;
  uint64_t bits = 0;
  NARROWS_UNROLL
  for (int64_t i = 0; i < kSelectWord; i += kLanes) {
    bits |= mask_bits(d, hn::Gt(hn::LoadU(d, key + i), hn::Set(d, value))) << i;
  }
  return bits;
}

/// Bits of the keys that exist when 64 are read from position i of n.
HWY_INLINE uint64_t existing_bits(int64_t i, int64_t n) {
  return n - i >= kSelectWord ? ~uint64_t{0} : (uint64_t{1} << (n - i)) - 1;
}

/// The keys with this digit, in order, to out (which may be key); returns how many.
HWY_INLINE int64_t keep_digit(const uint32_t* key, int64_t n, int shift, uint32_t mask, uint32_t digit,
                              uint32_t* out) {
  int64_t n_out = 0;
  for (int64_t i = 0; i < n; i += kSelectWord) {
    uint64_t bits = equal_bits(key + i, mask << shift, digit << shift) & existing_bits(i, n);
    for (; bits != 0; bits &= bits - 1) out[n_out++] = key[i + std::countr_zero(bits)];
  }
  return n_out;
}

/// The digit of the count-th largest key, from the tables that count_digits filled; makes count relative to
/// the keys with that digit. Whole vectors of bins are skipped while their keys are all among the selected
/// ones.
HWY_INLINE uint32_t find_digit(const uint32_t* bin, uint32_t mask, int64_t& count) {
  static_assert(kSelectTables == 2);
  const DU d;
  const uint32_t* second = bin + mask + 1;
  int64_t top = int64_t{mask} + 1;  // digits from here on are done
  while (true) {
    const VU sum = hn::Add(hn::LoadU(d, bin + top - kLanes), hn::LoadU(d, second + top - kLanes));
    const int64_t n_here = hn::GetLane(hn::SumOfLanes(d, sum));
    if (n_here >= count) break;
    count -= n_here;
    top -= kLanes;
  }
  int64_t digit = top - 1;
  while (int64_t{bin[digit]} + second[digit] < count) {
    count -= int64_t{bin[digit]} + second[digit];
    --digit;
  }
  return static_cast<uint32_t>(digit);
}

struct Threshold {
  uint32_t key;     ///< everything above it is selected
  int64_t n_equal;  ///< of those equal to it, so many, the first ones
};

/// The count-th largest of key [n], 1 <= count <= n. candidate [select_padded(n)] and bin are scratch.
HWY_INLINE Threshold find_threshold(const uint32_t* key, int64_t n, int64_t count, uint32_t* candidate,
                                    uint32_t* bin) {
  uint32_t prefix = 0;
  int shift = 32;
  while (true) {
    const int bits = shift > kSelectBits ? kSelectBits : shift;
    shift -= bits;
    const uint32_t mask = (1U << bits) - 1;
    count_digits(key, n, shift, mask, bin);
    const uint32_t digit = find_digit(bin, mask, count);
    prefix |= digit << shift;
    if (shift == 0) return {prefix, count};
    n = keep_digit(key, n, shift, mask, digit, candidate);
    key = candidate;
  }
}

}  // namespace

void select_top(const float* score, int64_t n, int64_t count, int32_t* index, void* scratch) {
  if (count <= 0) return;
  const DF df;
  const DU d;
  uint32_t* bin = static_cast<uint32_t*>(scratch);
  uint32_t* key = bin + kSelectTables * kSelectBins;
  uint32_t* candidate = key + select_padded(n);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(order_key(hn::LoadU(df, score + i)), d, key + i);
  if (i < n) hn::StoreU(order_key(load_n(df, score + i, n - i)), d, key + i);
  Threshold due = find_threshold(key, n, count, candidate, bin);

  for (i = 0; i < n; i += kSelectWord) {
    const uint64_t exist = existing_bits(i, n);
    uint64_t bits = above_bits(key + i, due.key) & exist;
    if (due.n_equal > 0) {
      for (uint64_t equal = equal_bits(key + i, ~0U, due.key) & exist; equal != 0 && due.n_equal > 0;
           --due.n_equal) {
        bits |= equal & -equal;
        equal &= equal - 1;
      }
    }
    for (; bits != 0; bits &= bits - 1) *index++ = static_cast<int32_t>(i + std::countr_zero(bits));
  }
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
