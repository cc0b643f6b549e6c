// Flash attention over packed tiles, once a CPU target, for number formats in which products are summed in
// float32: float itself and bfloat16.
//
// Lanes are QUERIES. A block of kQueryLanes rows is held transposed; keys and values are broadcast from the
// tile. So the maximum and the sum of a row are vertical operations, weights come out in the layout that the
// second product takes, and both products are one register block:
//
//   scores  [kRows keys, lanes]      += keys   [kRows, word] (broadcast) * queries [word, lanes]
//   outputs [kRows coordinates, lanes] += values [kRows, word] (broadcast) * weights [word, lanes]
//
// A word is one float, or two bfloat16 (two coordinates of a key; the same coordinate of two values). Scores
// never leave the registers: they become weights 2^(score - reference) at once. The reference of a row is not
// its running maximum but one that it had, at most 2^30 too low: weights above 1 are harmless in formats with
// float's exponent, and nearly all tiles then need no maximum, no rescaling and no second look. The sum of a
// tile's weights tells when that fails; then the tile's maximum is found and the tile done again.
//
// Reads: a tile (32 KB in bfloat16 at head_dim 64) once for all blocks of kQueryRows rows, from L2 or
// memory; a block's queries, weights and outputs (20 KB) from L1.

// clang-format off
#if defined(NARROWS_KERNELS_FLASH_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NARROWS_KERNELS_FLASH_INL_H
#undef NARROWS_KERNELS_FLASH_INL_H
#else
#define NARROWS_KERNELS_FLASH_INL_H
#endif
// clang-format on

#include <algorithm>
#include <limits>

#include "kernels/exp2-inl.h"
#include "kernels/prefill_kernel.h"

// Four steps in a row: see gemm-inl.h.
#undef NARROWS_UNROLL_STEPS
#if HWY_COMPILER_CLANG
#define NARROWS_UNROLL_STEPS _Pragma("clang loop unroll_count(4)")
#else
#define NARROWS_UNROLL_STEPS _Pragma("GCC unroll 4")
#endif

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

// 16 accumulators cover the latency of the bfloat16 product (6 cycles at 1 a cycle) and leave 16 registers
// for two rows of weights on their way; 12 x 2, 8 x 3 and 6 x 4 were a tenth slower on Zen 4, 4 x 4 a few
// percent. With 16 registers 8 accumulators cover two FMAs of 4 cycles.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
inline constexpr int kRows = 8;
inline constexpr int kVectors = 2;
#elif HWY_TARGET == HWY_NEON
inline constexpr int kRows = 4;
inline constexpr int kVectors = 4;
#else
inline constexpr int kRows = 4;
inline constexpr int kVectors = 2;
#endif
inline constexpr int64_t kQueryLanes = kVectors * kLanes;
inline constexpr int64_t kQueryBlocks = kQueryRows / kQueryLanes;
static_assert(kPrefillTile % kRows == 0 && kQueryRows % kQueryLanes == 0 && kRows % 2 == 0);

/// A tile's sum of weights above this asks for a new reference. 2^30 a key leaves 2^97 for the number of keys
/// and the size of values before anything overflows.
inline constexpr float kMostWeight = 0x1p30F;
/// The first reference of a row is the maximum over this many keys: usually good enough, and cheap.
inline constexpr int64_t kPeek = 16;

inline constexpr float kLog2E = 1.44269504F;
inline constexpr float kLn2 = 0.693147181F;
inline constexpr float kNegInf = -std::numeric_limits<float>::infinity();

/// Offsets in words of 4 bytes. dims: head_dim rounded up to whole register blocks, the rest is 0.
template <class F>
struct FlashTile {
  explicit FlashTile(int64_t head_dim) {
    // Coordinates in 4 bytes.
    constexpr int64_t kDense = F::kPer * static_cast<int64_t>(sizeof(float) / sizeof(typename F::Word));
    dims = (head_dim + kRows - 1) / kRows * kRows;
    keys = dims;
    values = keys + kPrefillTile * dims / kDense;
    words = values + kPrefillTile * dims / kDense;
  }
  int64_t dims;
  int64_t mean = 0;  ///< [dims] floats: what was taken away from the keys
  int64_t keys;      ///< [kPrefillTile / kRows][dims / kPer][kRows]
  int64_t values;    ///< [dims / kRows][kPrefillTile / kPer][kRows]
  int64_t words;
};

/// kQueryLanes rows of one head; a missing row repeats the last.
template <class F>
struct FlashBlock {
  typename F::Word* q;  ///< [dims / kPer, lanes], times scale log2(e)
  float* q_exact;       ///< [dims, lanes] the same before rounding; with kShift only
  float* out;           ///< [dims, lanes]
  float* max;           ///< [lanes] reference in base 2, less the base block's share; -infinity: no key yet
  float* sum;           ///< [lanes]
  bool referenced;      ///< every row has a reference
  int64_t n_row;

  static int64_t words(int64_t dims) { return (dims / F::kPer + 2 * dims + 2) * kQueryLanes; }
  void place(float* at, int64_t dims) {
    q = reinterpret_cast<typename F::Word*>(at);
    q_exact = at + dims / F::kPer * kQueryLanes;
    out = q_exact + dims * kQueryLanes;
    max = out + dims * kQueryLanes;
    sum = max + kQueryLanes;
  }
};

/// What one tile looks like to one block: keys [low, high) are computed, lane i sees [from[i], to[i]).
struct FlashView {
  int64_t low = 0;
  int64_t high = 0;
  bool masked = false;
  HWY_ALIGN int32_t from[kQueryLanes];
  HWY_ALIGN int32_t to[kQueryLanes];
  HWY_ALIGN float start[kQueryLanes];  ///< what a score begins with: the shift's share less the reference
};

/// acc [kRows][kVectors] += a [n, kRows] (broadcast) * b [n, kVectors vectors].
template <class F>
HWY_INLINE void multiply(int64_t n, const typename F::Word* HWY_RESTRICT a,
                         const typename F::Word* HWY_RESTRICT b, VF (&acc)[kRows][kVectors]) {
  NARROWS_UNROLL_STEPS
  for (int64_t p = 0; p < n; ++p) {
    typename F::Vector column[kVectors];
    NARROWS_UNROLL
    for (int j = 0; j < kVectors; ++j) column[j] = F::load(b + p * kQueryLanes + j * kLanes);
    NARROWS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      NARROWS_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = F::multiply_add(acc[i][j], column[j], a + p * kRows + i);
    }
  }
}

/// References to subtract: of a row without one, whose scores are all -infinity, any number will do.
HWY_INLINE VF finite_reference(const float* reference) {
  const VF r = hn::Load(DF(), reference);
  return hn::IfThenZeroElse(hn::Eq(r, hn::Set(DF(), kNegInf)), r);
}

/// Scores of keys [key, key + kRows) of the tile, -infinity where a lane does not see the key.
template <class F, bool kMasked>
HWY_INLINE void score(const FlashTile<F>& shape, const typename F::Word* keys, const FlashBlock<F>& b,
                      const FlashView& view, int64_t key, VF (&s)[kRows][kVectors]) {
  const DF d;
  NARROWS_UNROLL
  for (int i = 0; i < kRows; ++i) {
    NARROWS_UNROLL
    for (int j = 0; j < kVectors; ++j) s[i][j] = hn::Load(d, view.start + j * kLanes);
  }
  const int64_t n_word = shape.dims / F::kPer;
  multiply<F>(n_word, keys + key * n_word, b.q, s);
  if constexpr (kMasked) {
    const DI di;
    NARROWS_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const auto from = hn::Load(di, view.from + j * kLanes), to = hn::Load(di, view.to + j * kLanes);
      NARROWS_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const auto at = hn::Set(di, static_cast<int32_t>(key + i));
        const auto hidden = hn::Or(hn::Gt(from, at), hn::Not(hn::Gt(to, at)));
        s[i][j] = hn::IfThenElse(hn::RebindMask(d, hidden), hn::Set(d, kNegInf), s[i][j]);
      }
    }
  }
}

/// Weights of the tile's keys into p [keys / kPer, lanes]; their sums by lane. kExact: scores begin with the
/// offset alone and the reference is taken away at the end, as raise_reference() saw them. However large they
/// are and however coarse their rounding, none is above its reference then.
template <class F, bool kMasked, bool kExact>
HWY_INLINE void weigh(const FlashTile<F>& shape, const typename F::Word* keys, const FlashBlock<F>& b,
                      const FlashView& view, typename F::Word* p, VF (&sum)[kVectors]) {
  const DF d;
  NARROWS_UNROLL
  for (int j = 0; j < kVectors; ++j) sum[j] = hn::Zero(d);
  for (int64_t key = view.low; key < view.high; key += kRows) {
    VF s[kRows][kVectors];
    score<F, kMasked>(shape, keys, b, view, key, s);
    if constexpr (kExact) {
      for (int j = 0; j < kVectors; ++j) {
        const VF reference = finite_reference(b.max + j * kLanes);
        for (int i = 0; i < kRows; ++i) s[i][j] = hn::Sub(s[i][j], reference);
      }
    }
    NARROWS_UNROLL
    for (int i = 0; i < kRows; i += F::kPer) {
      NARROWS_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        F::weight(s[i][j], s[i + F::kPer - 1][j], p + (key + i) / F::kPer * kQueryLanes + j * kLanes, sum[j]);
      }
    }
  }
}

/// Raises the references to the maximum over the keys before `look` and scales what was summed.
template <class F>
HWY_NOINLINE void raise_reference(const FlashTile<F>& shape, const typename F::Word* keys, FlashBlock<F>& b,
                                  const FlashView& view, const float* offset, int64_t look) {
  const DF d;
  FlashView bare = view;
  std::copy_n(offset, kQueryLanes, bare.start);
  VF top[kVectors];
  for (int j = 0; j < kVectors; ++j) top[j] = hn::Load(d, b.max + j * kLanes);
  for (int64_t key = view.low; key < std::min(view.high, look); key += kRows) {
    VF s[kRows][kVectors];
    score<F, true>(shape, keys, b, bare, key, s);
    NARROWS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      NARROWS_UNROLL
      for (int j = 0; j < kVectors; ++j) top[j] = hn::Max(top[j], s[i][j]);
    }
  }
  b.referenced = true;
  for (int j = 0; j < kVectors; ++j) {
    const VF before = hn::Load(d, b.max + j * kLanes);
    // No key yet: any finite number subtracted from -infinity leaves it so.
    const auto empty = hn::Eq(top[j], hn::Set(d, kNegInf));
    const VF keep = exp2_any<6>(d, hn::Sub(before, hn::IfThenZeroElse(empty, top[j])));
    b.referenced = b.referenced && hn::AllFalse(d, empty);
    hn::Store(top[j], d, b.max + j * kLanes);
    hn::Store(hn::Mul(hn::Load(d, b.sum + j * kLanes), keep), d, b.sum + j * kLanes);
    for (int64_t c = 0; c < shape.dims; ++c) {
      float* at = b.out + c * kQueryLanes + j * kLanes;
      hn::Store(hn::Mul(hn::Load(d, at), keep), d, at);
    }
  }
}

HWY_INLINE void start_scores(const float* offset, const float* reference, float* start) {
  const DF d;
  for (int j = 0; j < kVectors; ++j) {
    const VF x = hn::Sub(hn::Load(d, offset + j * kLanes), finite_reference(reference + j * kLanes));
    hn::Store(x, d, start + j * kLanes);
  }
}

/// offset [lanes] = q . (mean - base): what the shift took away from this tile's scores beyond what it took
/// from all of them. That common part is a constant of the row and drops out of its softmax, which keeps
/// digits: on the heads that need a shift it is a hundred times the rest.
template <class F>
HWY_INLINE void shift_offset(int64_t dims, const float* mean, const float* base, const FlashBlock<F>& b,
                             float* offset) {
  const DF d;
  VF sum[kVectors];
  NARROWS_UNROLL
  for (int j = 0; j < kVectors; ++j) sum[j] = hn::Zero(d);
  NARROWS_UNROLL_STEPS
  for (int64_t c = 0; c < dims; ++c) {
    const VF difference = hn::Set(d, mean[c] - base[c]);
    NARROWS_UNROLL
    for (int j = 0; j < kVectors; ++j)
      sum[j] = hn::MulAdd(hn::Load(d, b.q_exact + c * kQueryLanes + j * kLanes), difference, sum[j]);
  }
  NARROWS_UNROLL
  for (int j = 0; j < kVectors; ++j) hn::Store(sum[j], d, offset + j * kLanes);
}

/// The view of tile t by a block whose lane 0 is row `row` of the call. False if no lane sees a key of it.
inline bool look_at(const PrefillRows& a, int64_t t, int64_t row, int64_t n_row, bool referenced,
                    FlashView& view) {
  const int64_t base = t * kPrefillTile;
  const auto from = [&](int64_t r) { return a.seen_begin(row + r) - base; };
  const auto to = [&](int64_t r) { return a.seen_end(row + r) - base; };
  const int64_t low = std::max<int64_t>(from(0), 0), high = std::min(to(n_row - 1), kPrefillTile);
  if (low >= high) return false;
  view.low = low / kRows * kRows;
  view.high = (high + kRows - 1) / kRows * kRows;
  view.masked = from(n_row - 1) > view.low || to(0) < view.high;
  if (!view.masked && referenced) return true;
  for (int64_t i = 0; i < kQueryLanes; ++i) {
    const int64_t r = std::min(i, n_row - 1);
    view.from[i] = static_cast<int32_t>(std::clamp<int64_t>(from(r), 0, kPrefillTile));
    view.to[i] = static_cast<int32_t>(std::clamp<int64_t>(to(r), 0, kPrefillTile));
  }
  return true;
}

/// True if a row without a reference sees keys of the tile, but only from `look` on.
inline bool sees_only_later(const FlashView& view, const float* max, int64_t look) {
  for (int64_t i = 0; i < kQueryLanes; ++i) {
    if (max[i] == kNegInf && view.from[i] < view.to[i] && view.from[i] >= look) return true;
  }
  return false;
}

/// Weights of the tile's keys into p and their sums by lane, against references that may have been raised.
template <class F, bool kShift>
void weigh_tile(const FlashTile<F>& shape, const float* tile, const float* base, FlashBlock<F>& b,
                FlashView& view, typename F::Word* p, VF (&sum)[kVectors]) {
  const DF d;
  const auto* keys = reinterpret_cast<const typename F::Word*>(tile + shape.keys);
  HWY_ALIGN float offset[kQueryLanes] = {};
  if constexpr (kShift) shift_offset<F>(shape.dims, tile + shape.mean, base, b, offset);

  if (!b.referenced) {
    int64_t look = view.low + kPeek;
    if (sees_only_later(view, b.max, look)) look = view.high;
    raise_reference<F>(shape, keys, b, view, offset, look);
  }
  start_scores(offset, b.max, view.start);
  if (view.masked) {
    weigh<F, true, false>(shape, keys, b, view, p, sum);
  } else {
    weigh<F, false, false>(shape, keys, b, view, p, sum);
  }
  auto bad = hn::Not(hn::Le(sum[0], hn::Set(d, kMostWeight)));  // NaN is bad too
  for (int j = 1; j < kVectors; ++j) bad = hn::Or(bad, hn::Not(hn::Le(sum[j], hn::Set(d, kMostWeight))));
  if (!hn::AllFalse(d, bad)) {
    for (int64_t i = 0; i < kQueryLanes && !view.masked; ++i) {
      view.from[i] = 0;
      view.to[i] = kPrefillTile;
    }
    raise_reference<F>(shape, keys, b, view, offset, view.high);
    std::copy_n(offset, kQueryLanes, view.start);
    weigh<F, true, true>(shape, keys, b, view, p, sum);
  }
}

template <class F, bool kShift>
void attend_tile(const FlashTile<F>& shape, const float* tile, const float* base, FlashBlock<F>& b,
                 FlashView& view, typename F::Word* p) {
  const DF d;
  const auto* values = reinterpret_cast<const typename F::Word*>(tile + shape.values);
  VF sum[kVectors];
  weigh_tile<F, kShift>(shape, tile, base, b, view, p, sum);
  for (int j = 0; j < kVectors; ++j)
    hn::Store(hn::Add(hn::Load(d, b.sum + j * kLanes), sum[j]), d, b.sum + j * kLanes);

  for (int64_t c = 0; c < shape.dims; c += kRows) {
    VF acc[kRows][kVectors];
    float* out = b.out + c * kQueryLanes;
    NARROWS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      NARROWS_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = hn::Load(d, out + i * kQueryLanes + j * kLanes);
    }
    multiply<F>((view.high - view.low) / F::kPer, values + (c * kPrefillTile + view.low * kRows) / F::kPer,
                p + view.low / F::kPer * kQueryLanes, acc);
    NARROWS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      NARROWS_UNROLL
      for (int j = 0; j < kVectors; ++j) hn::Store(acc[i][j], d, out + i * kQueryLanes + j * kLanes);
    }
  }
}

/// Rows [row, row + n_row) of the call, n_row <= kQueryLanes, into a block.
template <class F, bool kShift>
void take_queries(const PrefillRows& a, int64_t row, int64_t n_row, const FlashTile<F>& shape,
                  FlashBlock<F>& b) {
  const float factor = a.scale * kLog2E;
  b.n_row = n_row;
  b.referenced = false;
  std::fill_n(b.out, shape.dims * kQueryLanes, 0.0F);
  std::fill_n(b.max, kQueryLanes, kNegInf);
  std::fill_n(b.sum, kQueryLanes, 0.0F);
  for (int64_t i = 0; i < kQueryLanes; ++i) {
    const float* q = a.q + (row + std::min(i, n_row - 1)) * a.ldq;
    const auto at = [&](int64_t c) { return c < a.head_dim ? q[c] * factor : 0.0F; };
    for (int64_t c = 0; c < shape.dims; c += F::kPer)
      b.q[c / F::kPer * kQueryLanes + i] = F::word(at(c), at(c + F::kPer - 1));
    if constexpr (kShift) {
      for (int64_t c = 0; c < shape.dims; ++c) b.q_exact[c * kQueryLanes + i] = at(c);
    }
  }
}

template <class F, bool kShift>
void give_rows(const PrefillRows& a, int64_t row, const float* base, const FlashBlock<F>& b) {
  for (int64_t i = 0; i < b.n_row; ++i) {
    float* out = a.out + (row + i) * a.ldo;
    float factor = 1;
    if (a.max == nullptr) {
      factor = b.sum[i] == 0 ? 0.0F : 1.0F / b.sum[i];  // NaN passes through
    } else {
      float common = 0;
      if constexpr (kShift) {
        for (int64_t c = 0; c < a.head_dim; ++c) common += b.q_exact[c * kQueryLanes + i] * base[c];
      }
      a.max[row + i] = (b.max[i] + common) * kLn2;
      a.sum[row + i] = b.sum[i];
    }
    for (int64_t c = 0; c < a.head_dim; ++c) out[c] = b.out[c * kQueryLanes + i] * factor;
  }
}

/// The scratch of a call: weights of a tile, then the blocks.
template <class F>
struct FlashScratch {
  FlashScratch(std::byte* scratch, const FlashTile<F>& shape)
      : p(reinterpret_cast<typename F::Word*>(scratch)) {
    auto* at = reinterpret_cast<float*>(scratch) + kPrefillTile / F::kPer * kQueryLanes;
    for (FlashBlock<F>& b : blocks) {
      b.place(at, shape.dims);
      at += FlashBlock<F>::words(shape.dims);
    }
  }
  typename F::Word* p;
  FlashBlock<F> blocks[kQueryBlocks];
};

template <class F, bool kShift>
void flash_attend(const PrefillRows& a) {
  const FlashTile<F> shape(a.head_dim);
  FlashScratch<F> scratch(a.scratch, shape);
  const auto* tiles = reinterpret_cast<const float*>(a.tiles);
  FlashView view;
  for (int64_t row = 0; row < a.n_row; row += kQueryRows) {
    const int64_t n_row = std::min(a.n_row - row, kQueryRows),
                  n_block = (n_row + kQueryLanes - 1) / kQueryLanes;
    for (int64_t i = 0; i < n_block; ++i) {
      const int64_t at = i * kQueryLanes;
      take_queries<F, kShift>(a, row + at, std::min(n_row - at, kQueryLanes), shape, scratch.blocks[i]);
    }
    const int64_t last = a.seen_end(row + n_row - 1);
    // The first tile that any row of the call can see: one base for all, so that it is there when needed.
    const int64_t t0 = a.seen_begin(row) / kPrefillTile;
    const float* base = tiles + t0 * shape.words + shape.mean;
    for (int64_t t = t0; t * kPrefillTile < last; ++t) {
      if (a.skips(t)) continue;
      for (int64_t i = 0; i < n_block; ++i) {
        FlashBlock<F>& b = scratch.blocks[i];
        if (look_at(a, t, row + i * kQueryLanes, b.n_row, b.referenced, view))
          attend_tile<F, kShift>(shape, tiles + t * shape.words, base, b, view, scratch.p);
      }
    }
    for (int64_t i = 0; i < n_block; ++i)
      give_rows<F, kShift>(a, row + i * kQueryLanes, base, scratch.blocks[i]);
  }
}

/// Sums of tiles seen before a reference was raised, share [n_tile, kLookRows] from this block's lanes on,
/// follow it.
HWY_INLINE void follow_reference(const float* before, const float* now, int64_t n_tile, float* share) {
  const DF d;
  for (int j = 0; j < kVectors; ++j) {
    const VF old = hn::Load(d, before + j * kLanes), raised = hn::Load(d, now + j * kLanes);
    if (hn::AllTrue(d, hn::Eq(old, raised))) continue;
    // A row that had no reference has seen nothing: its sums are 0, and 0 * NaN would not be.
    const VF keep =
        hn::IfThenZeroElse(hn::Eq(old, hn::Set(d, kNegInf)), exp2_any<6>(d, hn::Sub(old, raised)));
    for (int64_t t = 0; t < n_tile; ++t) {
      float* at = share + t * kLookRows + j * kLanes;
      hn::StoreU(hn::Mul(hn::LoadU(d, at), keep), d, at);
    }
  }
}

/// Sums of weights to shares of the row.
HWY_INLINE void share_out(int64_t n_tile, float* share) {
  const DF d;
  for (int j = 0; j < kVectors; ++j) {
    VF total = hn::Zero(d);
    for (int64_t t = 0; t < n_tile; ++t)
      total = hn::Add(total, hn::LoadU(d, share + t * kLookRows + j * kLanes));
    const VF inverse = hn::IfThenZeroElse(hn::Eq(total, hn::Zero(d)), hn::Div(hn::Set(d, 1.0F), total));
    for (int64_t t = 0; t < n_tile; ++t) {
      float* at = share + t * kLookRows + j * kLanes;
      hn::StoreU(hn::Mul(hn::LoadU(d, at), inverse), d, at);
    }
  }
}

template <class F, bool kShift>
void flash_look(const PrefillRows& a, float* share) {
  static_assert(kLookRows % kQueryLanes == 0);
  const FlashTile<F> shape(a.head_dim);
  FlashScratch<F> scratch(a.scratch, shape);
  const auto* tiles = reinterpret_cast<const float*>(a.tiles);
  const int64_t n_tile = (a.end + kPrefillTile - 1) / kPrefillTile, t0 = a.seen_begin(0) / kPrefillTile;
  const float* base = tiles + t0 * shape.words + shape.mean;
  std::fill_n(share, n_tile * kLookRows, 0.0F);
  FlashBlock<F>& b = scratch.blocks[0];
  FlashView view;
  HWY_ALIGN float before[kQueryLanes];
  for (int64_t row = 0; row < a.n_row; row += kQueryLanes) {
    take_queries<F, kShift>(a, row, std::min(a.n_row - row, kQueryLanes), shape, b);
    for (int64_t t = t0; t < n_tile; ++t) {
      if (!look_at(a, t, row, b.n_row, b.referenced, view)) continue;
      std::copy_n(b.max, kQueryLanes, before);
      VF sum[kVectors];
      weigh_tile<F, kShift>(shape, tiles + t * shape.words, base, b, view, scratch.p, sum);
      follow_reference(before, b.max, t, share + row);
      for (int j = 0; j < kVectors; ++j) hn::StoreU(sum[j], DF(), share + t * kLookRows + row + j * kLanes);
    }
    share_out(n_tile, share + row);
  }
}

template <class F>
int64_t flash_tile_bytes(int64_t head_dim) {
  return FlashTile<F>(head_dim).words * static_cast<int64_t>(sizeof(float));
}

template <class F>
int64_t flash_scratch_bytes(int64_t head_dim) {
  const int64_t words =
      kPrefillTile / F::kPer * kQueryLanes + kQueryBlocks * FlashBlock<F>::words(FlashTile<F>(head_dim).dims);
  return words * static_cast<int64_t>(sizeof(float));
}

template <class F, bool kShift>
void flash_pack(const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t n, int64_t head_dim,
                float /*scale*/, std::byte* tile) {
  const FlashTile<F> shape(head_dim);
  auto* words = reinterpret_cast<float*>(tile);
  float* mean = words + shape.mean;
  auto* keys = reinterpret_cast<typename F::Word*>(words + shape.keys);
  auto* values = reinterpret_cast<typename F::Word*>(words + shape.values);
  std::fill_n(mean, shape.dims, 0.0F);
  if constexpr (kShift) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t c = 0; c < head_dim; ++c) mean[c] += k[j * ldk + c];
    }
    for (int64_t c = 0; c < head_dim; ++c) mean[c] /= static_cast<float>(n);
  }
  const int64_t n_word = shape.dims / F::kPer;
  for (int64_t j = 0; j < kPrefillTile; ++j) {
    const float* row = k + j * ldk;
    const auto at = [&](int64_t c) { return j < n && c < head_dim ? row[c] - mean[c] : 0.0F; };
    typename F::Word* to = keys + j / kRows * n_word * kRows + j % kRows;
    for (int64_t p = 0; p < n_word; ++p)
      to[p * kRows] = F::word(at(p * F::kPer), at(p * F::kPer + F::kPer - 1));
  }
  constexpr int64_t kPairs = kPrefillTile / F::kPer;
  for (int64_t p = 0; p < kPairs; ++p) {
    const int64_t j0 = p * F::kPer, j1 = j0 + F::kPer - 1;
    for (int64_t c = 0; c < shape.dims; ++c) {
      const float x0 = j0 < n && c < head_dim ? v[j0 * ldv + c] : 0.0F;
      const float x1 = j1 < n && c < head_dim ? v[j1 * ldv + c] : 0.0F;
      values[(c / kRows * kPairs + p) * kRows + c % kRows] = F::word(x0, x1);
    }
  }
}

template <class F, bool kShift>
inline constexpr PrefillKernel kFlashKernel = {flash_tile_bytes<F>, flash_pack<F, kShift>,
                                               flash_scratch_bytes<F>, flash_attend<F, kShift>,
                                               flash_look<F, kShift>};

}  // namespace
}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD

#endif  // re-inclusion guard
