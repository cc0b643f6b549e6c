// Prefill attention in half precision, once a CPU target and once a way in which products are summed (class P
// below; prefill_half.cpp and prefill_half_native.cpp have them). Between products numbers live in float
// registers and are rounded to half after every operation: for one addition, product or division that is what
// half arithmetic gives, since a float has more than twice a half's digits.
//
//   fp16        everything in half, as it is: q.k beyond 65504 is infinity
//   pasa        arXiv:2503.01873: keys shifted by most of their tile's mean, statistics moved to one common
//               shift by a running pseudo-average of row means
//   fp16_shift  keys shifted by their tile's whole mean in float32, softmax statistics in float32
//
// Lanes are queries, as in flash-inl.h; here the maximum is exact, since a weight above 1 would overflow.
//
// class P:
//   Word, kPer, word(x, x)   as flash_pack() takes them: how operands are stored, one a word
//   store(VF x, Word* to)    kLanes numbers that are halves
//   product<kKind, kSum>(n, a, b, acc)   acc [kRows][kVectors] = a [n, kRows] (broadcast) * b [n, lanes]

// clang-format off
#if defined(NARROWS_KERNELS_PREFILL_HALF_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NARROWS_KERNELS_PREFILL_HALF_INL_H
#undef NARROWS_KERNELS_PREFILL_HALF_INL_H
#else
#define NARROWS_KERNELS_PREFILL_HALF_INL_H
#endif
// clang-format on

#include "kernels/flash-inl.h"
#include "kernels/pasa.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

static_assert(kHalfChunk % kRows == 0 && kPrefillTile % kHalfChunk == 0);

HWY_INLINE VF round_half(VF x) { return to_float(DF(), to_half(DH(), x)); }

/// exp(x) rounded to half.
HWY_INLINE VF half_exp(VF x) { return round_half(exp2_any<6>(DF(), hn::Mul(x, hn::Set(DF(), kLog2E)))); }

HWY_INLINE void set_zero(VF (&acc)[kRows][kVectors]) {
  NARROWS_UNROLL
  for (int i = 0; i < kRows; ++i) {
    NARROWS_UNROLL
    for (int j = 0; j < kVectors; ++j) acc[i][j] = hn::Zero(DF());
  }
}

/// kQueryLanes rows of one head; [lanes] each but q, q_exact and out [dims, lanes].
template <class P>
struct HalfBlock {
  using Word = typename P::Word;
  Word* q;
  float* q_exact;
  float* out;
  float* max;  ///< of the scores as they are; pasa: less what the shift took
  float* sum;
  float* mean;    ///< pasa: running pseudo-average of row means
  float* n_tile;  ///< tiles seen
  int64_t n_row;

  static int64_t bytes(int64_t dims) {
    constexpr int64_t kFloat = sizeof(float), kWord = sizeof(Word);
    return ((2 * dims + 4) * kFloat + dims * kWord) * kQueryLanes;
  }
  void place(std::byte* at, int64_t dims) {
    q_exact = reinterpret_cast<float*>(at);
    out = q_exact + dims * kQueryLanes;
    max = out + dims * kQueryLanes;
    sum = max + kQueryLanes;
    mean = sum + kQueryLanes;
    n_tile = mean + kQueryLanes;
    q = reinterpret_cast<Word*>(n_tile + kQueryLanes);
  }
};

/// What a tile does to the state of a block: out = old * out + now * (weights * values).
struct HalfStep {
  HWY_ALIGN float old[kQueryLanes];
  HWY_ALIGN float now[kQueryLanes];
  HWY_ALIGN float top[kQueryLanes];  ///< what the weights are relative to
};

template <class Mask>
HWY_INLINE VF choose(Mask mask, VF yes, VF no) {
  return hn::IfThenElse(mask, yes, no);
}

/// Scores of keys [view.low, view.high) to s [kPrefillTile, lanes]; pasa: `total`, their sum by lane.
template <class P, PrefillKind kKind>
void half_scores(const FlashTile<P>& shape, const typename P::Word* keys, const HalfBlock<P>& b,
                 const FlashView& view, const float* offset, float divisor, float* s, float* total) {
  const DF d;
  VF sum[kVectors];
  for (int j = 0; j < kVectors; ++j) sum[j] = hn::Zero(d);
  for (int64_t key = view.low; key < view.high; key += kRows) {
    VF acc[kRows][kVectors];
    P::template product<kKind, HalfSum::scores>(shape.dims, keys + key * shape.dims, b.q, acc);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        VF x = acc[i][j];
        if (kKind == PrefillKind::fp16) x = round_half(hn::Div(x, hn::Set(d, divisor)));
        if (kKind == PrefillKind::fp16_shift) x = hn::Add(x, hn::Load(d, offset + j * kLanes));
        sum[j] = hn::Add(sum[j], x);
        hn::Store(x, d, s + (key + i) * kQueryLanes + j * kLanes);
      }
    }
  }
  for (int j = 0; j < kVectors; ++j) hn::Store(sum[j], d, total + j * kLanes);
}

/// True where lane j's vector sees key `at` of the tile.
HWY_INLINE auto seen(const FlashView& view, int j, int64_t at) {
  const DI di;
  const auto key = hn::Set(di, static_cast<int32_t>(at));
  const auto from = hn::Load(di, view.from + j * kLanes), to = hn::Load(di, view.to + j * kLanes);
  return hn::RebindMask(DF(), hn::AndNot(hn::Gt(from, key), hn::Gt(to, key)));
}

HWY_INLINE VF tile_max(const FlashView& view, const float* s, int j) {
  const DF d;
  VF top = hn::Set(d, kNegInf);
  for (int64_t key = view.low; key < view.high; ++key) {
    const VF x = hn::Load(d, s + key * kQueryLanes + j * kLanes);
    top = hn::Max(top, choose(seen(view, j, key), x, top));
  }
  return top;
}

/// Weights of scores s relative to `top` to p [kPrefillTile, lanes]; their sum in float32.
template <class P>
HWY_INLINE VF tile_weights(const FlashView& view, VF top, bool half_difference, const float* s,
                           typename P::Word* p, int j) {
  const DF d;
  VF sum = hn::Zero(d);
  for (int64_t key = view.low; key < view.high; ++key) {
    const int64_t at = key * kQueryLanes + j * kLanes;
    VF x = hn::Sub(hn::Load(d, s + at), top);
    if (half_difference) x = round_half(x);
    const VF w = hn::IfThenElseZero(seen(view, j, key), half_exp(x));
    sum = hn::Add(sum, w);
    P::store(w, p + at);
  }
  return sum;
}

/// Weights and new statistics; which factors the outputs take.
template <class P, PrefillKind kKind>
void half_statistics(const FlashView& view, float recovery, const float* total, const float* s,
                     typename P::Word* p, HalfBlock<P>& b, HalfStep& step) {
  const DF d;
  const VF zero = hn::Zero(d), one = hn::Set(d, 1.0F);
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = j * kLanes;
    const VF max = hn::Load(d, b.max + at), sum = hn::Load(d, b.sum + at),
             n_tile = hn::Load(d, b.n_tile + at);
    const DI di;
    const auto sees = hn::RebindMask(d, hn::Gt(hn::Load(di, view.to + at), hn::Load(di, view.from + at)));
    const auto first = hn::Eq(n_tile, zero);
    VF new_max, new_sum, old, now, mean = hn::Load(d, b.mean + at);
    const VF top = tile_max(view, s, j);
    if constexpr (kKind == PrefillKind::pasa) {
      const VF inverse = hn::Set(d, recovery);
      const VF row_mean = round_half(hn::Div(hn::Load(d, total + at), hn::Set(d, float{kPrefillTile})));
      const VF n = hn::Add(n_tile, one);
      const VF new_mean = round_half(hn::Add(mean, hn::Div(hn::Sub(row_mean, mean), n)));
      const VF move_now = round_half(hn::Mul(inverse, round_half(hn::Sub(row_mean, new_mean))));
      const VF move_old =
          hn::IfThenZeroElse(first, round_half(hn::Mul(inverse, round_half(hn::Sub(mean, new_mean)))));
      const VF tile_sum = round_half(tile_weights<P>(view, top, true, s, p, j));
      const VF moved = round_half(hn::Add(top, move_now));
      new_max = choose(first, moved, hn::Max(round_half(hn::Add(max, move_old)), moved));
      old = hn::IfThenZeroElse(first,
                               half_exp(round_half(hn::Add(round_half(hn::Sub(max, new_max)), move_old))));
      now = half_exp(round_half(hn::Add(round_half(hn::Sub(top, new_max)), move_now)));
      new_sum = round_half(hn::Add(round_half(hn::Mul(old, sum)), round_half(hn::Mul(now, tile_sum))));
      mean = choose(sees, new_mean, mean);
    } else {
      constexpr bool kHalf = kKind == PrefillKind::fp16;
      new_max = choose(first, top, hn::Max(max, top));
      const VF tile_sum = tile_weights<P>(view, new_max, kHalf, s, p, j);
      now = one;
      if constexpr (kHalf) {
        old = hn::IfThenZeroElse(first, half_exp(round_half(hn::Sub(max, new_max))));
        new_sum = round_half(hn::Add(round_half(hn::Mul(old, sum)), round_half(tile_sum)));
      } else {
        old = hn::IfThenZeroElse(first, exp2_any<6>(d, hn::Mul(hn::Sub(max, new_max), hn::Set(d, kLog2E))));
        new_sum = hn::MulAdd(old, sum, tile_sum);
      }
    }
    hn::Store(choose(sees, new_max, max), d, b.max + at);
    hn::Store(choose(sees, new_sum, sum), d, b.sum + at);
    hn::Store(mean, d, b.mean + at);
    hn::Store(choose(sees, hn::Add(n_tile, one), n_tile), d, b.n_tile + at);
    hn::Store(choose(sees, old, one), d, step.old + at);
    hn::Store(choose(sees, now, zero), d, step.now + at);
  }
}

template <class P, PrefillKind kKind>
void half_outputs(const FlashTile<P>& shape, const typename P::Word* values, const FlashView& view,
                  const typename P::Word* p, const HalfStep& step, HalfBlock<P>& b) {
  const DF d;
  for (int64_t c = 0; c < shape.dims; c += kRows) {
    VF acc[kRows][kVectors];
    P::template product<kKind, HalfSum::values>(
        view.high - view.low, values + c * kPrefillTile + view.low * kRows, p + view.low * kQueryLanes, acc);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        float* at = b.out + (c + i) * kQueryLanes + j * kLanes;
        const VF old = hn::Mul(hn::Load(d, step.old + j * kLanes), hn::Load(d, at));
        const VF now = hn::Mul(hn::Load(d, step.now + j * kLanes), acc[i][j]);
        if constexpr (kKind == PrefillKind::fp16_shift) {
          hn::Store(hn::Add(old, now), d, at);
        } else {
          hn::Store(round_half(hn::Add(round_half(old), round_half(now))), d, at);
        }
      }
    }
  }
}

template <class P>
void half_take(const PrefillRows& a, int64_t row, int64_t n_row, const FlashTile<P>& shape, HalfBlock<P>& b) {
  b.n_row = n_row;
  std::fill_n(b.out, (shape.dims + 4) * kQueryLanes, 0.0F);  // max, sum, mean and n_tile follow
  for (int64_t i = 0; i < kQueryLanes; ++i) {
    const float* q = a.q + (row + std::min(i, n_row - 1)) * a.ldq;
    for (int64_t c = 0; c < shape.dims; ++c) {
      const float x = c < a.head_dim ? q[c] : 0.0F;
      b.q[c * kQueryLanes + i] = P::word(x, x);
      b.q_exact[c * kQueryLanes + i] = x * a.scale;
    }
  }
}

template <class P, PrefillKind kKind>
void half_give(const PrefillRows& a, int64_t row, float recovery, const float* base, const HalfBlock<P>& b) {
  for (int64_t i = 0; i < b.n_row; ++i) {
    const bool empty = b.n_tile[i] == 0;
    float factor = 1;
    if (a.max == nullptr) {
      factor = empty ? 0.0F : 1.0F / b.sum[i];
    } else {
      float common = 0;
      if constexpr (kKind == PrefillKind::pasa) common = recovery * b.mean[i];
      if constexpr (kKind == PrefillKind::fp16_shift) {
        for (int64_t c = 0; c < a.head_dim; ++c) common += b.q_exact[c * kQueryLanes + i] * base[c];
      }
      a.max[row + i] = empty ? kNegInf : b.max[i] + common;
      a.sum[row + i] = b.sum[i];
    }
    for (int64_t c = 0; c < a.head_dim; ++c)
      a.out[(row + i) * a.ldo + c] = b.out[c * kQueryLanes + i] * factor;
  }
}

template <class P, PrefillKind kKind>
void half_tile(const PrefillRows& a, const FlashTile<P>& shape, const float* tile, const float* base,
               float recovery, FlashView& view, HalfBlock<P>& b, float* s, typename P::Word* p) {
  using Word = typename P::Word;
  const auto* keys = reinterpret_cast<const Word*>(tile + shape.keys);
  const auto* values = reinterpret_cast<const Word*>(tile + shape.values);
  HWY_ALIGN float offset[kQueryLanes] = {};
  HWY_ALIGN float total[kQueryLanes];
  HalfStep step;
  if constexpr (kKind == PrefillKind::pasa) {  // the row mean is over all keys, seen or not
    view.low = 0;
    view.high = kPrefillTile;
  } else {  // whole chunks of the accumulator
    view.low = view.low / kHalfChunk * kHalfChunk;
    view.high = (view.high + kHalfChunk - 1) / kHalfChunk * kHalfChunk;
  }
  if constexpr (kKind == PrefillKind::fp16_shift) {
    const DF d;
    for (int64_t c = 0; c < shape.dims; ++c) {
      const VF difference = hn::Set(d, tile[shape.mean + c] - base[c]);
      for (int j = 0; j < kVectors; ++j) {
        float* at = offset + j * kLanes;
        hn::Store(
            hn::MulAdd(hn::Load(d, b.q_exact + c * kQueryLanes + j * kLanes), difference, hn::Load(d, at)), d,
            at);
      }
    }
  }
  half_scores<P, kKind>(shape, keys, b, view, offset, round_to_half(1 / a.scale), s, total);
  half_statistics<P, kKind>(view, recovery, total, s, p, b, step);
  half_outputs<P, kKind>(shape, values, view, p, step, b);
}

template <class P, PrefillKind kKind>
void half_attend(const PrefillRows& a) {
  const FlashTile<P> shape(a.head_dim);
  auto* s = reinterpret_cast<float*>(a.scratch);
  auto* p = reinterpret_cast<typename P::Word*>(s + kPrefillTile * kQueryLanes);
  HalfBlock<P> b{};
  b.place(reinterpret_cast<std::byte*>(p + kPrefillTile * kQueryLanes), shape.dims);
  const float recovery = kKind == PrefillKind::pasa ? pasa_matrix(a.scale).recovery : 0.0F;
  const auto* tiles = reinterpret_cast<const float*>(a.tiles);
  FlashView view;
  for (int64_t row = 0; row < a.n_row; row += kQueryLanes) {
    half_take<P>(a, row, std::min(kQueryLanes, a.n_row - row), shape, b);
    const int64_t t0 = a.seen_begin(row) / kPrefillTile;
    const float* base = tiles + t0 * shape.words + shape.mean;
    for (int64_t t = t0; t * kPrefillTile < a.seen_end(row + b.n_row - 1); ++t) {
      if (a.skips(t)) continue;
      if (look_at(a, t, row, b.n_row, false, view))
        half_tile<P, kKind>(a, shape, tiles + t * shape.words, base, recovery, view, b, s, p);
    }
    half_give<P, kKind>(a, row, recovery, base, b);
  }
}

template <class P>
int64_t half_scratch_bytes(int64_t head_dim) {
  constexpr int64_t kBytes = sizeof(float) + sizeof(typename P::Word);
  return kPrefillTile * kQueryLanes * kBytes + HalfBlock<P>::bytes(FlashTile<P>(head_dim).dims);
}

template <class P, PrefillKind kKind>
void half_pack(const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t n, int64_t head_dim,
               float scale, std::byte* to) {
  const FlashTile<P> shape(head_dim);
  auto* tile = reinterpret_cast<float*>(to);
  flash_pack<P, kKind == PrefillKind::fp16_shift>(k, ldk, v, ldv, n, head_dim, scale, to);
  if constexpr (kKind == PrefillKind::fp16) return;
  const PasaMatrix m = pasa_matrix(scale);
  for (int64_t j = 0; j < kPrefillTile; ++j) {
    for (int64_t c = 0; c < head_dim; c += kHalfChunk) {
      float row[kHalfChunk];
      const int64_t n_coord = std::min(kHalfChunk, head_dim - c);
      if constexpr (kKind == PrefillKind::pasa) {
        pasa_key(m, k, ldk, n, j, c, n_coord, row);
      } else {
        for (int64_t d = 0; d < n_coord; ++d)
          row[d] = j < n ? round_to_half((k[j * ldk + c + d] - tile[shape.mean + c + d]) * scale) : 0.0F;
      }
      auto* keys =
          reinterpret_cast<typename P::Word*>(tile + shape.keys) + j / kRows * kRows * shape.dims + j % kRows;
      for (int64_t d = 0; d < n_coord; ++d) keys[(c + d) * kRows] = P::word(row[d], row[d]);
    }
  }
}

template <class P, PrefillKind kKind>
inline constexpr PrefillKernel kHalfKernel = {flash_tile_bytes<P>, half_pack<P, kKind>, half_scratch_bytes<P>,
                                              half_attend<P, kKind>, nullptr};

}  // namespace
}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD

#endif  // re-inclusion guard
