// expand_index, score_index, softmax_part: the scan over the index of a latent cache. Planes become bytes by
// mask arithmetic (a lane a token), bytes are multiplied by int8 queries four coordinates at a time.
#include "kernels/latent_page.h"
#include "kernels/ref/ref.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/latent_score.cpp"
#include <hwy/foreach_target.h>

#include "kernels/byte_products-inl.h"
#include "kernels/exp2-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

using DW = hn::Repartition<uint16_t, DF>;
static_assert(kTile % kByteLanes == 0);

#if HWY_TARGET == HWY_AVX3_DL
/// Byte m of qword t: from where plane 8 - 1 - m .. of `kept` planes comes, see expand_all(); 255: zero.
struct PlaneOrder {
  HWY_ALIGN uint8_t source[kMaxBits + 1][64];
  constexpr PlaneOrder() : source() {
    for (int kept = 1; kept <= kMaxBits; ++kept) {
      for (int t = 0; t < 8; ++t) {
        for (int m = 0; m < 8; ++m) {
          const int significance = 7 - m;
          source[kept][8 * t + m] =
              static_cast<uint8_t>(significance < kept ? 8 * (kept - 1 - significance) + t : 255);
        }
      }
    }
  }
};
constexpr PlaneOrder kPlaneOrder;

/// All kTile codes of one coordinate: a product of bit matrices transposes eight planes of eight slots at a
/// time. gf2p8affineqb gives bit b of byte i of a qword as the parity of (byte 7 - b of the matrix) & (byte i
/// of the other): with one bit in each byte of the other, the matrix's columns. `bits` planes are there, the
/// first `kept` count.
HWY_INLINE VB expand_all(const uint8_t* planes, int bits, int kept) {
  const DB d;
  const __mmask64 there = bits == 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * bits)) - 1;
  const __m512i order = _mm512_load_si512(kPlaneOrder.source[kept]);
  const __m512i raw = _mm512_maskz_loadu_epi8(there, planes);
  const __mmask64 used = _mm512_movepi8_mask(order);  // ones where there is nothing to take
  __m512i matrix;
  asm("vpermb %2, %1, %0 %{%3%}%{z%}" : "=v"(matrix) : "v"(order), "v"(raw), "Yk"(~used));
  const __m512i each_slot = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201ULL));
  __m512i code;
  // Highway's target has GFNI and VBMI (it checks the CPU for them) but 1.0.3 does not tell the compiler so.
  asm("vgf2p8affineqb $0, %2, %1, %0" : "=v"(code) : "v"(each_slot), "v"(matrix));
  return VB{code};
}
#endif

#if HWY_TARGET != HWY_AVX3_DL
/// Codes of one coordinate for kByteLanes slots.
HWY_INLINE VB expand(const uint8_t* planes, int n_plane) {
  const DB d;
  VB code = hn::Zero(d);
  for (int j = 0; j < n_plane; ++j) {
    uint8_t bits[8];  // LoadMaskBits may look at 8
    std::memcpy(bits, planes + j * kTile / 8, kByteLanes / 8);
    const VB set = hn::VecFromMask(d, hn::LoadMaskBits(d, bits));  // -1 where the bit is set
    code = hn::Sub(hn::Add(code, code), set);
  }
  return code;
}
#endif

#if NARROWS_BYTE_PRODUCTS
/// Up to this many coordinates have their query in a buffer on the stack.
constexpr int64_t kMaxIndex = 512;

/// Query rows scored together: their sums over 64 tokens stay in registers where there are 32 of them.
constexpr int kScoreRows = 4;
constexpr int64_t kSweep = kLanes == 16 ? kTile : 16;

/// A query row rounded to int8.
struct ByteQuery {
  HWY_ALIGN int8_t weight[kMaxIndex + kLatentPad];
  float unit;    ///< of a weight
  float offset;  ///< what centring takes away, and the row's own constant
};

/// The n <= kLanes products u step at p and q.
template <bool kWhole>
HWY_INLINE VF products_at(const float* p, const float* q, int64_t n) {
  const DF d;
  return kWhole ? hn::Mul(hn::LoadU(d, p), hn::LoadU(d, q)) : hn::Mul(load_n(d, p, n), load_n(d, q, n));
}

template <bool kWhole>
HWY_INLINE VF round_part(const float* u, const float* step, const float* centre, int64_t n, VF inverse,
                         VF shift, int8_t* weight) {
  const DF d;
  // Adding 1.5 x 2^23 rounds to an integer, whose low byte is then the float's.
  const VF magic = hn::Set(d, 12582912.0F);
  const VF shifted = hn::MulAdd(products_at<kWhole>(u, step, n), inverse, magic);
#if HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_AVX3
  // One instruction; TruncateTo() of 1.0.3 takes a permutation, and a wrong one with VBMI.
  _mm_storeu_si128(reinterpret_cast<__m128i*>(weight),
                   _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted.raw)));
#else
  const hn::Rebind<uint8_t, DF> db;
  const auto bytes = hn::TruncateTo(db, hn::BitCast(hn::RebindToUnsigned<DF>(), shifted));
  hn::StoreU(bytes, db, reinterpret_cast<uint8_t*>(weight));
#endif
  const VF at = kWhole ? hn::LoadU(d, centre) : load_n(d, centre, n);
  return hn::MulAdd(hn::Sub(shifted, magic), at, shift);
}

HWY_INLINE void round_query(const float* u, int64_t n_coord, const float* step, const float* centre,
                            ByteQuery& q) {
  const DF d;
  const int64_t whole = n_coord / kLanes * kLanes, rest = n_coord - whole;
  VF top = hn::Zero(d);
  for (int64_t c = 0; c < whole; c += kLanes)
    top = hn::Max(top, hn::Abs(products_at<true>(u + c, step + c, kLanes)));
  if (rest > 0) top = hn::Max(top, hn::Abs(products_at<false>(u + whole, step + whole, rest)));
  const float largest = hn::GetLane(hn::MaxOfLanes(d, top));
  q.unit = largest / 127;
  const VF inverse = hn::Set(d, largest > 0 ? 127 / largest : 0.0F);
  VF shift = hn::Zero(d);
  for (int64_t c = 0; c < whole; c += kLanes)
    shift = round_part<true>(u + c, step + c, centre + c, kLanes, inverse, shift, q.weight + c);
  if (rest > 0) {
    shift =
        round_part<false>(u + whole, step + whole, centre + whole, rest, inverse, shift, q.weight + whole);
  }
  q.offset = u[n_coord] - q.unit * hn::GetLane(hn::SumOfLanes(d, shift));
}

/// kRows query rows against kTokens tokens.
template <int kRows, int64_t kTokens>
HWY_INLINE void score_block(const uint8_t* codes, int64_t n_coord, const ByteQuery* q, float* score,
                            int64_t lds) {
  constexpr int kVectors = static_cast<int>(kTokens / kLanes);
  const DF d;
  const DI di;
  const DB db;
  VI sum[kRows][kVectors];
  NARROWS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NARROWS_UNROLL
    for (int j = 0; j < kVectors; ++j) sum[r][j] = hn::Zero(di);
  }
  for (int64_t c = 0; c < n_coord; c += 4) {
    VB code[kVectors];
    NARROWS_UNROLL
    for (int j = 0; j < kVectors; ++j) code[j] = hn::LoadU(db, codes + c * kTile + j * kByteLanes);
    NARROWS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      int32_t four = 0;
      std::memcpy(&four, q[r].weight + c, sizeof(four));
      const VB weight = hn::BitCast(db, hn::Set(di, four));
      NARROWS_UNROLL
      for (int j = 0; j < kVectors; ++j) sum[r][j] = add_products(sum[r][j], code[j], weight);
    }
  }
  NARROWS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const VF unit = hn::Set(d, q[r].unit), offset = hn::Set(d, q[r].offset);
    NARROWS_UNROLL
    for (int j = 0; j < kVectors; ++j)
      hn::StoreU(hn::MulAdd(hn::ConvertTo(d, sum[r][j]), unit, offset), d, score + r * lds + j * kLanes);
  }
}

/// kRows query rows against tokens [first, first + n).
template <int kRows>
HWY_INLINE void score_tokens(const uint8_t* codes, int64_t n_coord, const ByteQuery* q, int64_t first,
                             int64_t n, float* score, int64_t lds) {
  int64_t t = first;
  for (; t + kSweep <= first + n; t += kSweep)
    score_block<kRows, kSweep>(codes + 4 * t, n_coord, q, score + t, lds);
  for (; t < first + n; t += 16) score_block<kRows, 16>(codes + 4 * t, n_coord, q, score + t, lds);
}
#endif  // NARROWS_BYTE_PRODUCTS

}  // namespace

void expand_index(const uint8_t* planes, const uint8_t* octet_bits, int64_t n_octet, int max_bits,
                  uint8_t* codes) {
  const DB d;
  const DW dw;
  for (int64_t i = 0; i < 2 * n_octet; ++i) {  // four coordinates at a time
    const int bits = octet_bits[i / 2];
    const int kept = bits < max_bits ? bits : max_bits;
    const int64_t next = bits * kTile / 8;
    for (int64_t part = 0; part < kTile / kByteLanes; ++part) {
      const uint8_t* from = planes + part * kByteLanes / 8;
#if HWY_TARGET == HWY_AVX3_DL
      const VB a = expand_all(from, bits, kept);
      const VB b = expand_all(from + next, bits, kept);
      const VB c = expand_all(from + 2 * next, bits, kept);
      const VB e = expand_all(from + 3 * next, bits, kept);
#else
      const VB a = expand(from, kept);
      const VB b = expand(from + next, kept);
      const VB c = expand(from + 2 * next, kept);
      const VB e = expand(from + 3 * next, kept);
#endif
      const auto ab_low = hn::BitCast(dw, hn::InterleaveLower(d, a, b));
      const auto ab_high = hn::BitCast(dw, hn::InterleaveUpper(d, a, b));
      const auto ce_low = hn::BitCast(dw, hn::InterleaveLower(d, c, e));
      const auto ce_high = hn::BitCast(dw, hn::InterleaveUpper(d, c, e));
      // Slots are ordered so that these are runs of tokens: 16 q + (first token of the part).
      uint8_t* to = codes + i * 4 * kTile + part * kByteLanes;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dw, ab_low, ce_low)), d, to);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dw, ab_low, ce_low)), d, to + kTile);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dw, ab_high, ce_high)), d, to + 2 * kTile);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dw, ab_high, ce_high)), d, to + 3 * kTile);
    }
    planes += 4 * next;
  }
}

void score_index(const uint8_t* codes, int64_t n_coord, const float* u, int64_t ldu, int64_t n_row,
                 const float* step, const float* centre, int64_t first, int64_t n, float* score,
                 int64_t lds) {
#if NARROWS_BYTE_PRODUCTS
  if (n_coord <= kMaxIndex) {
    ByteQuery q[kScoreRows];
    // Nine rows are three times three, not twice four and one.
    const int64_t n_call = (n_row + kScoreRows - 1) / kScoreRows;
    for (int64_t call = 0; call < n_call; ++call) {
      const int64_t r = call * n_row / n_call, m = (call + 1) * n_row / n_call - r;
      for (int64_t i = 0; i < m; ++i) round_query(u + (r + i) * ldu, n_coord, step, centre, q[i]);
      float* to = score + r * lds;
      switch (m) {
        case 1:
          score_tokens<1>(codes, n_coord, q, first, n, to, lds);
          break;
        case 2:
          score_tokens<2>(codes, n_coord, q, first, n, to, lds);
          break;
        case 3:
          score_tokens<3>(codes, n_coord, q, first, n, to, lds);
          break;
        default:
          score_tokens<kScoreRows>(codes, n_coord, q, first, n, to, lds);
          break;
      }
    }
    return;
  }
#endif
  ref::score_index(codes, n_coord, u, ldu, n_row, step, centre, first, n, score, lds);
}

namespace {

/// s [n] to exponential(s - max), with their sum.
template <class Exponential>
HWY_INLINE void softmax(float* s, int64_t n, float* max, float* sum, Exponential&& exponential) {
  const DF d;
  const int64_t whole = n / kLanes * kLanes;
  VF top_lane = hn::Set(d, s[0]);
  for (int64_t i = 0; i < whole; i += kLanes) top_lane = hn::Max(top_lane, hn::LoadU(d, s + i));
  float top = hn::GetLane(hn::MaxOfLanes(d, top_lane));
  for (int64_t i = whole; i < n; ++i) top = s[i] > top ? s[i] : top;
  const VF shift = hn::Set(d, top);
  VF total = hn::Zero(d);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const VF e = exponential(hn::Sub(hn::LoadU(d, s + i), shift));
    total = hn::Add(total, e);
    hn::StoreU(e, d, s + i);
  }
  if (whole < n) {
    const VF e = hn::IfThenElseZero(hn::FirstN(d, static_cast<size_t>(n - whole)),
                                    exponential(hn::Sub(load_n(d, s + whole, n - whole), shift)));
    total = hn::Add(total, e);
    store_n(e, d, s + whole, n - whole);
  }
  *max = top;
  *sum = hn::GetLane(hn::SumOfLanes(d, total));
}

}  // namespace

void softmax_part(float* s, int64_t n, float* max, float* sum) {
  softmax(s, n, max, sum, [](VF x) { return exp_nonpositive(DF(), x); });
}

void softmax_scores(float* s, int64_t n, float* max, float* sum) {
  const VF log2_e = hn::Set(DF(), 1.44269504F);
  softmax(s, n, max, sum, [log2_e](VF x) { return exp2_any<3>(DF(), hn::Mul(x, log2_e)); });
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
