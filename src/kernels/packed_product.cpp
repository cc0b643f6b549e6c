// packed_product: tiles of 16 rows of weights times a few rows of bytes. A group of 32 inputs is unpacked
// once (4 to 8 vectors of codes, the scales of its rows) and multiplied with every row of inputs; sums of a
// group are integers, exact, then scaled and added up in float, group after group.
//
// With one row of inputs this must keep up with memory: of q4_0, 288 bytes a group against 8 byte products,
// 12 instructions to unpack and 6 to scale, on AVX-512 with VNNI some 15 cycles, so 60 GB/s of one core.
#include "kernels/packed_weights.h"
#include "kernels/ref/ref.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/packed_product.cpp"
#include <hwy/foreach_target.h>

#include "kernels/byte_products-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

#if NARROWS_BYTE_PRODUCTS
namespace {

/// Vectors of 16 lanes' worth of rows.
constexpr int kParts = static_cast<int>(kPackRows / kLanes);

/// Rows of inputs at once: as many as leave registers for the codes.
constexpr int kMaxRows = HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_AVX3 ? 8 : 4;

/// 16-bit lanes shifted by `by` to the left if positive, else to the right; what is kept of each byte is
/// masked by the caller.
template <int by>
HWY_INLINE VB shift(VB x) {
  const hn::Repartition<uint16_t, DF> d;
  if constexpr (by > 0) {
    return hn::BitCast(DB(), hn::ShiftLeft<by>(hn::BitCast(d, x)));
  } else if constexpr (by < 0) {
    return hn::BitCast(DB(), hn::ShiftRight<-by>(hn::BitCast(d, x)));
  } else {
    return x;
  }
}

/// (x & mask) | rest
HWY_INLINE VB masked_or(VB x, VB mask, VB rest) {
#if HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_AVX3
  return VB{_mm512_ternarylogic_epi32(x.raw, mask.raw, rest.raw, 0xEA)};
#else
  return hn::Or(hn::And(x, mask), rest);
#endif
}

/// Numbers of vector pair (i, i + 4) of a group, for part `part` of the rows.
template <Packing p, int i>
HWY_INLINE void load_pair(const uint8_t* at, VB (&code)[8]) {
  const DB d;
  constexpr int bits = code_bits(p);
  if constexpr (bits == 8) {
    code[i] = hn::LoadU(d, at + 64 * i);
    code[4 + i] = hn::LoadU(d, at + 64 * (4 + i));
  } else {
    const VB four = hn::Set(d, 15);
    const VB both = hn::LoadU(d, at + 64 * i);
    code[i] = hn::And(both, four);
    code[4 + i] = hn::And(shift<-4>(both), four);
    if constexpr (bits == 5) {
      const VB high = hn::LoadU(d, at + 256), fifth = hn::Set(d, 16);
      code[i] = masked_or(shift<4 - i>(high), fifth, code[i]);
      code[4 + i] = masked_or(shift<-i>(high), fifth, code[4 + i]);
    } else if constexpr (bits == 6) {
      const VB high = hn::LoadU(d, at + 256), high2 = hn::LoadU(d, at + 320), two = hn::Set(d, 48);
      code[i] = masked_or(shift<4 - 2 * i>(high), two, code[i]);
      code[4 + i] = masked_or(shift<4 - 2 * i>(high2), two, code[4 + i]);
    }
    if constexpr (has_table(p)) {
      const VB table = hn::LoadDup128(d, code_table(p));
      code[i] = hn::TableLookupBytes(table, code[i]);
      code[4 + i] = hn::TableLookupBytes(table, code[4 + i]);
    }
  }
}

template <Packing p>
HWY_INLINE void load_codes(const uint8_t* at, VB (&code)[8]) {
  load_pair<p, 0>(at, code);
  load_pair<p, 1>(at, code);
  load_pair<p, 2>(at, code);
  load_pair<p, 3>(at, code);
}

HWY_INLINE VB four_bytes(const int8_t* at) {
  int32_t four = 0;
  std::memcpy(&four, at, sizeof(four));
  return hn::BitCast(DB(), hn::Set(DI(), four));
}

#if HWY_TARGET != HWY_AVX3_DL
/// Signed bytes w times x, as a product that takes one factor unsigned: |w| and x with w's sign. |w| <= 128
/// and |x| <= 127 add up to at most 32512 in pairs.
HWY_INLINE VS signed_pair_products(VB w, VB x) {
#if HWY_TARGET == HWY_AVX3
  const __mmask64 negative = _mm512_movepi8_mask(w.raw);
  return pair_products(VB{_mm512_abs_epi8(w.raw)},
                       VB{_mm512_mask_sub_epi8(x.raw, negative, _mm512_setzero_si512(), x.raw)});
#elif HWY_TARGET == HWY_AVX2
  return pair_products(VB{_mm256_abs_epi8(w.raw)}, VB{_mm256_sign_epi8(x.raw, w.raw)});
#else
  return pair_products(VB{_mm_abs_epi8(w.raw)}, VB{_mm_sign_epi8(x.raw, w.raw)});
#endif
}
#endif

/// Sum over vectors [first, first + n) of a group of (code - zero) x for each row, an integer. minus: minus
/// the sum of those x.
template <Packing p, int first, int n>
HWY_INLINE VI group_sum(const VB (&code)[8], const int8_t* x, int32_t minus) {
  const DI di;
  constexpr int kZero = zero_shift(p);
#if HWY_TARGET == HWY_AVX3_DL
  // Two chains: a product takes 4 cycles.
  VI even = kZero == 0 ? hn::Zero(di) : hn::Set(di, minus * (1 << kZero));
  VI odd = hn::Zero(di);
  NARROWS_UNROLL
  for (int j = first; j < first + n; j += 2) {
    even = add_products_of_four(even, code[j], x + 4 * j);
    odd = add_products_of_four(odd, code[j + 1], x + 4 * (j + 1));
  }
  return hn::Add(even, odd);
#else
  constexpr int kBits = number_bits(p);
  if constexpr (kBits == 8) {
    const VB flip = hn::Set(DB(), 0x80);
    VI sum = hn::Zero(di);
    NARROWS_UNROLL
    for (int j = first; j < first + n; ++j) {
      sum = hn::Add(sum, add_pairs(signed_pair_products(hn::Xor(code[j], flip), four_bytes(x + 4 * j))));
    }
    return sum;
  } else {
    // Sums of 16 bits hold 8, 4 or 2 pairs of products: 8 * 2 * 15 * 127 = 30480.
    constexpr int kPairs = kBits == 4 ? 8 : kBits == 5 ? 4 : 2;
    VI sum = kZero == 0 ? hn::Zero(di) : hn::Set(di, minus * (1 << kZero));
    NARROWS_UNROLL
    for (int j = first; j < first + n; j += kPairs) {
      VS pairs = pair_products(code[j], four_bytes(x + 4 * j));
      NARROWS_UNROLL
      for (int i = 1; i < kPairs && i < n; ++i) {
        pairs = hn::Add(pairs, pair_products(code[j + i], four_bytes(x + 4 * (j + i))));
      }
      sum = hn::Add(sum, add_pairs(pairs));
    }
    return sum;
  }
#endif
}

/// The numbers s_0, t_0, .. [16][kPackRows] of 8 groups.
HWY_INLINE void unpack_six_bits(const uint8_t* packed, uint8_t* HWY_RESTRICT out) {
  const DB d;
  const VB low = hn::Set(d, 63), two = hn::Set(d, 3);
  for (int64_t i = 0; i < 64; i += kByteLanes) {
    const VB a = hn::LoadU(d, packed + i), b = hn::LoadU(d, packed + 64 + i),
             c = hn::LoadU(d, packed + 128 + i);
    hn::StoreU(hn::And(a, low), d, out + i);
    hn::StoreU(hn::And(b, low), d, out + 64 + i);
    hn::StoreU(hn::And(c, low), d, out + 128 + i);
    const VB top = masked_or(shift<-4>(b), hn::Set(d, 12), hn::And(shift<-6>(a), two));
    hn::StoreU(masked_or(shift<-2>(c), hn::Set(d, 48), top), d, out + 192 + i);
  }
}

HWY_INLINE VF load_halves(const uint8_t* at) {
  const DH dh;
  return to_float(DF(), hn::BitCast(dh, hn::LoadU(hn::Repartition<uint8_t, DH>(), at)));
}

template <class T>
HWY_INLINE VF load_small(const uint8_t* at) {
  const hn::Rebind<T, DI> d;
  return hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(d, reinterpret_cast<const T*>(at))));
}

/// Scales of a record.
template <Packing p>
struct Scales {
  const uint8_t* at = nullptr;
  HWY_ALIGN uint8_t six[256];

  HWY_INLINE void read(const uint8_t* record) {
    at = record;
    if constexpr (is_super(p) && has_minimum(p)) unpack_six_bits(at + 4 * kPackRows, six);
  }

  /// Of group g of the record and a part of the rows: d (half 1: of the second 16 inputs of a q6_k group).
  HWY_INLINE VF d(int64_t g, int64_t row, int64_t half) const {
    if constexpr (p == Packing::mxfp4) {
      const DI di;
      const VI e = hn::PromoteTo(di, hn::LoadU(hn::Rebind<uint8_t, DI>(), at + row));
      const VI normal = hn::ShiftLeft<23>(hn::Sub(e, hn::Set(di, 1)));
      const VI small = hn::ShiftLeft<21>(hn::Add(e, hn::Set(di, 1)));
      return hn::BitCast(DF(), hn::IfThenElse(hn::Lt(e, hn::Set(di, 2)), small, normal));
    }
    const VF d = load_halves(at + 2 * row);
    if constexpr (p == Packing::q6_k) {
      return hn::Mul(d, load_small<int8_t>(at + 2 * kPackRows + kPackRows * (2 * g + half) + row));
    } else if constexpr (is_super(p)) {
      return hn::Mul(d, load_small<uint8_t>(six + kPackRows * 2 * g + row));
    } else {
      return d;
    }
  }
  /// And m, of the types that have one; to be subtracted in "k" types.
  HWY_INLINE VF m(int64_t g, int64_t row) const {
    const VF m = load_halves(at + 2 * kPackRows + 2 * row);
    if constexpr (is_super(p)) {
      return hn::Mul(m, load_small<uint8_t>(six + kPackRows * (2 * g + 1) + row));
    } else {
      return m;
    }
  }
};

/// sum [kRows][kParts] += one group times kRows rows of inputs. codes: of the group, number g of its record;
/// at: index of the group in the first row of inputs, those of the next rows are n_group further.
template <Packing p, int kRows>
HWY_INLINE void group_product(const uint8_t* codes, const Scales<p>& scales, int64_t g, const ByteRows& x,
                              int64_t at, int64_t n_group, VF (&sum)[kRows][kParts]) {
  const DF d;
  NARROWS_UNROLL
  for (int i = 0; i < kParts; ++i) {
    const int64_t first_row = i * kLanes;
    VB code[8];
    load_codes<p>(codes + i * kByteLanes, code);
    const VF scale = scales.d(g, first_row, 0);
    const VF scale2 = p == Packing::q6_k ? scales.d(g, first_row, 1) : hn::Zero(d);
    const VF minimum = has_minimum(p) ? scales.m(g, first_row) : hn::Zero(d);
    NARROWS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int64_t here = at + r * n_group;
      const int8_t* bytes = x.code + here * kPackGroup;
      const VF unit = hn::Set(d, x.scale[here]);
      VF& to = sum[r][i];
      if constexpr (p == Packing::q6_k) {
        const VI low = group_sum<p, 0, 4>(code, bytes, x.minus_half[2 * here]);
        const VI high = group_sum<p, 4, 4>(code, bytes, x.minus_half[2 * here + 1]);
        to = hn::MulAdd(hn::ConvertTo(d, low), hn::Mul(scale, unit), to);
        to = hn::MulAdd(hn::ConvertTo(d, high), hn::Mul(scale2, unit), to);
      } else {
        const VI all = group_sum<p, 0, 8>(code, bytes, x.minus[here]);
        to = hn::MulAdd(hn::ConvertTo(d, all), hn::Mul(scale, unit), to);
      }
      if constexpr (has_minimum(p)) {
        const VF total = hn::Set(d, x.total[here]);
        to = is_super(p) ? hn::NegMulAdd(minimum, total, to) : hn::MulAdd(minimum, total, to);
      }
    }
  }
}

/// sum [kRows][kParts] = one tile times kRows rows of inputs from `row` on.
template <Packing p, int kRows>
HWY_INLINE void tile_product(const uint8_t* tile, int64_t n_in, const ByteRows& x, int64_t row,
                             VF (&sum)[kRows][kParts]) {
  constexpr int64_t kGroups = inputs_at_once(p) / kPackGroup;
  const int64_t n_group = n_in / kPackGroup;
  NARROWS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NARROWS_UNROLL
    for (int i = 0; i < kParts; ++i) sum[r][i] = hn::Zero(DF());
  }
  Scales<p> scales;
  for (int64_t at = row * n_group; at < (row + 1) * n_group; at += kGroups, tile += record_bytes(p)) {
    scales.read(tile);
    for (int64_t g = 0; g < kGroups; ++g) {
      group_product<p, kRows>(tile + scale_bytes(p) + g * group_code_bytes(p), scales, g, x, at + g, n_group,
                              sum);
    }
  }
}

/// y [kRows, ldy] at the first n_here rows of a tile (+)= the tile times kRows rows of inputs.
template <Packing p, int kRows>
HWY_NOINLINE void rows_product(const uint8_t* tile, int64_t n_in, const ByteRows& x, int64_t row, float* y,
                               int64_t ldy, int64_t n_here, bool accumulate) {
  const DF d;
  VF sum[kRows][kParts];
  tile_product<p, kRows>(tile, n_in, x, row, sum);
  NARROWS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NARROWS_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const int64_t left = n_here - i * kLanes;
      float* to = y + r * ldy + i * kLanes;
      if (left >= kLanes) {
        hn::StoreU(accumulate ? hn::Add(hn::LoadU(d, to), sum[r][i]) : sum[r][i], d, to);
      } else if (left > 0) {
        store_n(accumulate ? hn::Add(load_n(d, to, left), sum[r][i]) : sum[r][i], d, to, left);
      }
    }
  }
}

template <Packing p>
void product_of(const PackedMatrix& w, int64_t first, int64_t n_tile, const ByteRows& x, int64_t n_row,
                float* y, int64_t ldy, bool accumulate) {
  const int64_t bytes = tile_bytes(p, w.n_in);
  for (int64_t t = first; t < first + n_tile; ++t) {
    const uint8_t* tile = w.tiles + t * bytes;
    const int64_t left = w.n_out - t * kPackRows, n_here = left < kPackRows ? left : kPackRows;
    float* to = y + t * kPackRows;
    int64_t r = 0;
    if constexpr (kMaxRows >= 8) {
      for (; r + 8 <= n_row; r += 8)
        rows_product<p, 8>(tile, w.n_in, x, r, to + r * ldy, ldy, n_here, accumulate);
    }
    for (; r + 4 <= n_row; r += 4)
      rows_product<p, 4>(tile, w.n_in, x, r, to + r * ldy, ldy, n_here, accumulate);
    for (; r + 2 <= n_row; r += 2)
      rows_product<p, 2>(tile, w.n_in, x, r, to + r * ldy, ldy, n_here, accumulate);
    if (r < n_row) rows_product<p, 1>(tile, w.n_in, x, r, to + r * ldy, ldy, n_here, accumulate);
  }
}

/// Weights of a group as bfloat16, kLanes rows of it from `row` on.
template <Packing p>
HWY_INLINE void unpack_group(const uint8_t* codes, const Scales<p>& scales, int64_t g, int64_t row,
                             uint16_t* HWY_RESTRICT out, int64_t ld) {
  const DF d;
  const hn::Repartition<uint32_t, DF> du;
  const hn::Rebind<uint16_t, DI> half;
  VB code[8];
  load_codes<p>(codes, code);
  const VF first = scales.d(g, row, 0), second = p == Packing::q6_k ? scales.d(g, row, 1) : first;
  const VF minimum = has_minimum(p) ? scales.m(g, row) : hn::Zero(d);
  const VF zero = hn::Set(d, zero_shift(p) == 0 ? 0.0F : static_cast<float>(1 << zero_shift(p)));
  NARROWS_UNROLL
  for (int j = 0; j < 8; ++j) {
    auto four = hn::BitCast(du, code[j]);
    NARROWS_UNROLL
    for (int t = 0; t < 4; ++t) {
      const VI one = hn::BitCast(DI(), hn::And(four, hn::Set(du, 255)));
      four = hn::ShiftRight<8>(four);
      // A product of so few bits is exact, whichever way it is added to.
      VF x = hn::Mul(j < 4 ? first : second, hn::Sub(hn::ConvertTo(d, one), zero));
      if constexpr (has_minimum(p)) x = is_super(p) ? hn::Sub(x, minimum) : hn::Add(x, minimum);
      const auto bits = hn::BitCast(du, x);
      const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
      const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFF))));
      const auto word = hn::IfThenElse(hn::RebindMask(du, hn::Ne(x, x)), hn::Set(du, 0x7FC0), rounded);
      hn::StoreU(hn::DemoteTo(half, hn::BitCast(DI(), word)), half, out + (4 * j + t) * ld);
    }
  }
}

template <Packing p>
void unpack_of(const uint8_t* tile, int64_t n_in, uint16_t* out, int64_t ld) {
  Scales<p> scales;
  for (int64_t k = 0; k < n_in; k += inputs_at_once(p), tile += record_bytes(p)) {
    scales.read(tile);
    for (int64_t g = 0; g < inputs_at_once(p) / kPackGroup; ++g) {
      const uint8_t* codes = tile + scale_bytes(p) + g * group_code_bytes(p);
      for (int64_t i = 0; i < kParts; ++i)
        unpack_group<p>(codes + i * kByteLanes, scales, g, i * kLanes,
                        out + (k + g * kPackGroup) * ld + i * kLanes, ld);
    }
  }
}

}  // namespace

void unpack_tile(const PackedMatrix& w, int64_t tile, uint16_t* out, int64_t ld) {
  const uint8_t* at = w.tiles + tile * tile_bytes(w.packing, w.n_in);
  switch (w.packing) {
    case Packing::q4_0:
      return unpack_of<Packing::q4_0>(at, w.n_in, out, ld);
    case Packing::q4_1:
      return unpack_of<Packing::q4_1>(at, w.n_in, out, ld);
    case Packing::q5_0:
      return unpack_of<Packing::q5_0>(at, w.n_in, out, ld);
    case Packing::q5_1:
      return unpack_of<Packing::q5_1>(at, w.n_in, out, ld);
    case Packing::q8_0:
      return unpack_of<Packing::q8_0>(at, w.n_in, out, ld);
    case Packing::q4_k:
      return unpack_of<Packing::q4_k>(at, w.n_in, out, ld);
    case Packing::q5_k:
      return unpack_of<Packing::q5_k>(at, w.n_in, out, ld);
    case Packing::q6_k:
      return unpack_of<Packing::q6_k>(at, w.n_in, out, ld);
    case Packing::iq4_nl:
      return unpack_of<Packing::iq4_nl>(at, w.n_in, out, ld);
    case Packing::mxfp4:
      return unpack_of<Packing::mxfp4>(at, w.n_in, out, ld);
  }
}

void packed_product(const PackedMatrix& w, int64_t first, int64_t n_tile, const ByteRows& x, int64_t n_row,
                    float* y, int64_t ldy, bool accumulate) {
  switch (w.packing) {
    case Packing::q4_0:
      return product_of<Packing::q4_0>(w, first, n_tile, x, n_row, y, ldy, accumulate);
    case Packing::q4_1:
      return product_of<Packing::q4_1>(w, first, n_tile, x, n_row, y, ldy, accumulate);
    case Packing::q5_0:
      return product_of<Packing::q5_0>(w, first, n_tile, x, n_row, y, ldy, accumulate);
    case Packing::q5_1:
      return product_of<Packing::q5_1>(w, first, n_tile, x, n_row, y, ldy, accumulate);
    case Packing::q8_0:
      return product_of<Packing::q8_0>(w, first, n_tile, x, n_row, y, ldy, accumulate);
    case Packing::q4_k:
      return product_of<Packing::q4_k>(w, first, n_tile, x, n_row, y, ldy, accumulate);
    case Packing::q5_k:
      return product_of<Packing::q5_k>(w, first, n_tile, x, n_row, y, ldy, accumulate);
    case Packing::q6_k:
      return product_of<Packing::q6_k>(w, first, n_tile, x, n_row, y, ldy, accumulate);
    case Packing::iq4_nl:
      return product_of<Packing::iq4_nl>(w, first, n_tile, x, n_row, y, ldy, accumulate);
    case Packing::mxfp4:
      return product_of<Packing::mxfp4>(w, first, n_tile, x, n_row, y, ldy, accumulate);
  }
}

#else  // NARROWS_BYTE_PRODUCTS

void packed_product(const PackedMatrix& w, int64_t first, int64_t n_tile, const ByteRows& x, int64_t n_row,
                    float* y, int64_t ldy, bool accumulate) {
  ref::packed_product(w, first, n_tile, x, n_row, y, ldy, accumulate);
}

void unpack_tile(const PackedMatrix& w, int64_t tile, uint16_t* out, int64_t ld) {
  ref::unpack_tile(w, tile, out, ld);
}

#endif  // NARROWS_BYTE_PRODUCTS

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
