// sum_planes, score_rows_f16: attending to the tokens that a sparse step has selected. Rows of keys lie where
// they were rebuilt, rows of values in their pages, as bit planes.
#include <algorithm>
#include <iterator>

#include "kernels/latent_page.h"
#include "kernels/ref/ref.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/latent_attend.cpp"
#include <hwy/foreach_target.h>

#include "kernels/simd-inl.h"

#undef NARROWS_PLANE_BYTES
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
#define NARROWS_PLANE_BYTES 1  ///< 64 bits of a plane are a mask of bytes
#else
#define NARROWS_PLANE_BYTES 0
#endif

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

/// What a set bit of plane j adds to the value of all unset: 2^(1 - j).
constexpr float kTwice[kMaxBits] = {2.0F, 1.0F, 0.5F, 0.25F, 0.125F, 0.0625F, 0.03125F, 0.015625F};

/// Query rows of one pass of sum_vector: that many sums of a vector of coordinates stay in registers.
constexpr int64_t kSumRows = 4;

/// One vector of coordinates, octets [o, o + kOctets), of kRows sums over n tokens.
template <int kRows>
HWY_INLINE void sum_vector(const uint8_t* const* rows, const float* const* amplitudes, int64_t n,
                           const PlaneRow& shape, int64_t o, const float* weight, int64_t ldw,
                           bool accumulate, float* sum, int64_t lds) {
  constexpr int64_t kOctets = kLanes / kOctet;  // 1 or 2
  const DF d;
  const auto first_octet = hn::FirstN(d, kOctet);
  int n_plane = 0;
  int n_whole = 0;
  while (n_plane < shape.n_plane && shape.octets[static_cast<size_t>(n_plane)] > o) ++n_plane;
  while (n_whole < n_plane && shape.octets[static_cast<size_t>(n_whole)] >= o + kOctets) ++n_whole;
  // A set bit of plane j counts 2^-j, an unset one -2^-j: bits twice, less all of them.
  float all_first = 0;
  float all_second = 0;
  for (int j = 0; j < n_plane; ++j) all_first += kTwice[j] / 2;
  for (int j = 0; j < n_whole; ++j) all_second += kTwice[j] / 2;
  const VF base = hn::Neg(hn::IfThenElse(first_octet, hn::Set(d, all_first), hn::Set(d, all_second)));
  VF total[kRows];
  NARROWS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    total[r] = accumulate ? hn::LoadU(d, sum + r * lds + o * kOctet) : hn::Zero(d);
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* row = rows[i];
    VF value = base;
    for (int j = 0; j < n_plane; ++j) {
      const uint8_t* from = row + shape.offset[static_cast<size_t>(j)] + o;
      uint16_t bits = from[0];
      if (kOctets == 2 && j < n_whole) std::memcpy(&bits, from, sizeof(bits));
      const auto set = mask_from_bits(d, bits);
      value = hn::IfThenElse(set, hn::Add(value, hn::Set(d, kTwice[j])), value);
    }
    value = hn::Mul(value, hn::LoadU(d, amplitudes[i] + o * kOctet));
    NARROWS_UNROLL
    for (int r = 0; r < kRows; ++r) total[r] = hn::MulAdd(hn::Set(d, weight[r * ldw + i]), value, total[r]);
  }
  NARROWS_UNROLL
  for (int r = 0; r < kRows; ++r) hn::StoreU(total[r], d, sum + r * lds + o * kOctet);
}

#if NARROWS_PLANE_BYTES
using DB = hn::Repartition<int8_t, DF>;
using VB = hn::Vec<DB>;

/// Octets whose codes fill a vector of bytes.
constexpr int64_t kByteOctets = 8;

/// Planes of octets [octet, octet + kByteOctets) of a row, or of those that there are, as codes of a byte:
/// the sum of +-2^(n_plane - 1 - j) over the planes j that a coordinate has, 2^(n_plane - 1) times its
/// number. At most 127 with kMaxPlanes planes.
class PlaneBytes {
 public:
  static constexpr int kMaxPlanes = 7;
  static bool can_read(const PlaneRow& shape) {
    return shape.n_plane <= kMaxPlanes && shape.bytes >= kByteOctets;
  }

  PlaneBytes(const PlaneRow& shape, int64_t octet) {
    const DB d;
    all_unset_ = hn::Zero(d);
    while (n_plane_ < shape.n_plane && shape.octets[static_cast<size_t>(n_plane_)] > octet) ++n_plane_;
    for (int j = 0; j < n_plane_; ++j) {
      const auto at = static_cast<size_t>(j);
      const int64_t there = shape.octets[at] - octet;
      int64_t from = shape.offset[at] + octet;
      mask_[j] = ~uint64_t{0};
      shift_[j] = 0;
      if (there < kByteOctets) {
        // Reads the end of the row where it would read beyond it.
        const int64_t beyond = from + kByteOctets - shape.bytes;
        if (beyond > 0) {
          from -= beyond;
          shift_[j] = static_cast<int>(8 * beyond);
        }
        mask_[j] >>= 8 * (kByteOctets - there);
      } else {
        n_whole_ = j + 1;
      }
      offset_[j] = from;
      step_[j] = hn::Set(d, static_cast<int8_t>(1 << (n_plane_ - j)));
      all_unset_ =
          add_where(mask_[j], all_unset_, hn::Set(d, static_cast<int8_t>(-(1 << (n_plane_ - 1 - j)))));
    }
  }

  /// What numbers are codes times.
  float unit() const { return n_plane_ == 0 ? 0.0F : kTwice[n_plane_ - 1] / 2; }

  HWY_INLINE VB codes(const uint8_t* row) const {
    VB code = all_unset_;
    for (int j = 0; j < n_whole_; ++j) code = add_where(word(row + offset_[j]), code, step_[j]);
    for (int j = n_whole_; j < n_plane_; ++j)
      code = add_where(word(row + offset_[j]) >> shift_[j] & mask_[j], code, step_[j]);
    return code;
  }

 private:
  static HWY_INLINE uint64_t word(const uint8_t* p) {
    uint64_t bits = 0;
    std::memcpy(&bits, p, sizeof(bits));
    return bits;
  }
  static HWY_INLINE VB add_where(uint64_t bits, VB a, VB b) {
    return hn::IfThenElse(hn::Mask<DB>{static_cast<decltype(hn::Mask<DB>().raw)>(bits)}, hn::Add(a, b), a);
  }

  int n_plane_ = 0;
  int n_whole_ = 0;  ///< planes that have all octets
  VB all_unset_;
  VB step_[kMaxPlanes];
  uint64_t mask_[kMaxPlanes];
  int64_t offset_[kMaxPlanes];
  int shift_[kMaxPlanes];
};

/// kVectors vectors of coordinates, from one of planes' on, of kRows sums over n tokens.
template <int kRows, int kVectors>
HWY_INLINE void sum_bytes(const PlaneBytes& planes, int first, const uint8_t* const* rows,
                          const float* const* amplitudes, int64_t n, int64_t coord, const float* weight,
                          int64_t ldw, bool accumulate, float* sum, int64_t lds) {
  const DF d;
  const DI di;
  const hn::Rebind<int8_t, DF> db;
  VF total[kRows][kVectors];
  NARROWS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NARROWS_UNROLL
    for (int v = 0; v < kVectors; ++v) total[r][v] = hn::Zero(d);
  }
  for (int64_t i = 0; i < n; ++i) {
    HWY_ALIGN int8_t code[hn::MaxLanes(DB())];
    hn::Store(planes.codes(rows[i]), DB(), code);
    VF value[kVectors];
    NARROWS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const VF whole = hn::ConvertTo(d, hn::PromoteTo(di, hn::Load(db, code + (first + v) * kLanes)));
      value[v] = hn::Mul(whole, hn::LoadU(d, amplitudes[i] + coord + v * kLanes));
    }
    NARROWS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VF w = hn::Set(d, weight[r * ldw + i]);
      NARROWS_UNROLL
      for (int v = 0; v < kVectors; ++v) total[r][v] = hn::MulAdd(w, value[v], total[r][v]);
    }
  }
  const VF unit = hn::Set(d, planes.unit());
  NARROWS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    NARROWS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* to = sum + r * lds + coord + v * kLanes;
      hn::StoreU(accumulate ? hn::MulAdd(total[r][v], unit, hn::LoadU(d, to)) : hn::Mul(total[r][v], unit), d,
                 to);
    }
  }
}

/// kRows sums, as many vectors at a time as stay in registers.
template <int kRows>
HWY_NOINLINE void sum_rows(const uint8_t* const* rows, const float* const* amplitudes, int64_t n,
                           const PlaneRow& shape, const float* weight, int64_t ldw, bool accumulate,
                           float* sum, int64_t lds) {
  constexpr int kAtOnce = kRows <= 4 ? 4 : kRows <= 6 ? 3 : 2;
  const int64_t n_vector = (shape.n_octet * kOctet + kLanes - 1) / kLanes;
  constexpr int64_t kBytes = kByteOctets * kOctet / kLanes;  // vectors of one PlaneBytes
  for (int64_t begin = 0; begin < n_vector; begin += kBytes) {
    const PlaneBytes planes(shape, begin * kLanes / kOctet);
    const int64_t end = n_vector - begin < kBytes ? n_vector - begin : kBytes;
    for (int64_t v = 0; v < end;) {
      const auto some = [&](auto m) {
        constexpr int kSome = decltype(m)::value;
        sum_bytes<kRows, kSome>(planes, static_cast<int>(v), rows, amplitudes, n, (begin + v) * kLanes,
                                weight, ldw, accumulate, sum, lds);
        v += kSome;
      };
      const int64_t left = end - v;
      if constexpr (kAtOnce >= 4) {
        if (left >= 4) {
          some(std::integral_constant<int, 4>());
          continue;
        }
      }
      if constexpr (kAtOnce >= 3) {
        if (left == 3) {
          some(std::integral_constant<int, 3>());
          continue;
        }
      }
      if (left >= 2) {
        some(std::integral_constant<int, 2>());
      } else {
        some(std::integral_constant<int, 1>());
      }
    }
  }
}
#endif  // NARROWS_PLANE_BYTES

}  // namespace

void sum_planes(const uint8_t* const* rows, const float* const* amplitudes, int64_t n, const PlaneRow& shape,
                const float* weight, int64_t ldw, int64_t n_row, bool accumulate, float* sum, int64_t lds) {
#if NARROWS_PLANE_BYTES
  if (PlaneBytes::can_read(shape)) {
    static constexpr decltype(&sum_rows<1>) kByRows[] = {sum_rows<1>, sum_rows<2>, sum_rows<3>, sum_rows<4>,
                                                         sum_rows<5>, sum_rows<6>, sum_rows<7>, sum_rows<8>};
    constexpr int64_t kMost = std::size(kByRows);
    const int64_t n_call = (n_row + kMost - 1) / kMost;  // of nearly as many rows each
    for (int64_t call = 0; call < n_call; ++call) {
      const int64_t r = call * n_row / n_call, m = (call + 1) * n_row / n_call - r;
      kByRows[m - 1](rows, amplitudes, n, shape, weight + r * ldw, ldw, accumulate, sum + r * lds, lds);
    }
    return;
  }
#endif
  if constexpr (kLanes < kOctet) {
    ref::sum_planes(rows, amplitudes, n, shape, weight, ldw, n_row, accumulate, sum, lds);
  } else {
    for (int64_t r = 0; r < n_row; r += kSumRows) {
      const float* w = weight + r * ldw;
      float* to = sum + r * lds;
      for (int64_t o = 0; o < shape.n_octet; o += kLanes / kOctet) {
        switch (n_row - r) {
          case 1:
            sum_vector<1>(rows, amplitudes, n, shape, o, w, ldw, accumulate, to, lds);
            break;
          case 2:
            sum_vector<2>(rows, amplitudes, n, shape, o, w, ldw, accumulate, to, lds);
            break;
          case 3:
            sum_vector<3>(rows, amplitudes, n, shape, o, w, ldw, accumulate, to, lds);
            break;
          default:
            sum_vector<kSumRows>(rows, amplitudes, n, shape, o, w, ldw, accumulate, to, lds);
        }
      }
    }
  }
}

namespace {

/// Keys of one block of scores: the lanes of 16 bytes.
constexpr int kKeys = 4;
/// Query rows of one block: 16-byte blocks of a vector, but two where there is one.
constexpr int kScoreRows = kLanes >= 16 ? 4 : 2;

/// Sums of the lanes of a[0 .. 4), of each 16 bytes apart: lane i of block b is that of block b of a[i].
HWY_INLINE VF add_lanes(const VF* a) {
  const DF d;
  const hn::Repartition<uint64_t, DF> d64;
  const VF low = hn::Add(hn::InterleaveLower(d, a[0], a[1]), hn::InterleaveUpper(d, a[0], a[1]));
  const VF high = hn::Add(hn::InterleaveLower(d, a[2], a[3]), hn::InterleaveUpper(d, a[2], a[3]));
  const auto low64 = hn::BitCast(d64, low), high64 = hn::BitCast(d64, high);
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, low64, high64)),
                 hn::BitCast(d, hn::InterleaveUpper(d64, low64, high64)));
}

/// Scores of kRows <= kScoreRows rows of q against kKeys keys, of which `there` are written.
template <int kRows>
HWY_INLINE void score_keys(const f16_t* const* k, const float* q, int64_t head_dim, int64_t there,
                           float* score, int64_t lds) {
  const DF d;
  VF sum[kScoreRows][kKeys];
  NARROWS_UNROLL
  for (int r = 0; r < kScoreRows; ++r) {
    NARROWS_UNROLL
    for (int i = 0; i < kKeys; ++i) sum[r][i] = hn::Zero(d);
  }
  const auto add = [&](const VF* key, int r, VF row) {
    NARROWS_UNROLL
    for (int i = 0; i < kKeys; ++i) sum[r][i] = hn::MulAdd(key[i], row, sum[r][i]);
  };
  int64_t c = 0;
  for (; c + kLanes <= head_dim; c += kLanes) {
    VF key[kKeys];
    NARROWS_UNROLL
    for (int i = 0; i < kKeys; ++i) key[i] = load_float(d, k[i] + c);
    NARROWS_UNROLL
    for (int r = 0; r < kRows; ++r) add(key, r, hn::LoadU(d, q + r * head_dim + c));
  }
  if (c < head_dim) {
    VF key[kKeys];
    NARROWS_UNROLL
    for (int i = 0; i < kKeys; ++i) key[i] = load_float_n(d, k[i] + c, head_dim - c);
    NARROWS_UNROLL
    for (int r = 0; r < kRows; ++r) add(key, r, load_n(d, q + r * head_dim + c, head_dim - c));
  }
  VF by_row[kScoreRows];
  NARROWS_UNROLL
  for (int r = 0; r < kScoreRows; ++r) by_row[r] = add_lanes(sum[r]);
  HWY_ALIGN float scores[kScoreRows][kKeys];
  if constexpr (kLanes == 16) {
    // Block b of what is left is row b.
    const VF low =
        hn::Add(hn::ConcatLowerLower(d, by_row[2], by_row[0]), hn::ConcatUpperUpper(d, by_row[2], by_row[0]));
    const VF high =
        hn::Add(hn::ConcatLowerLower(d, by_row[3], by_row[1]), hn::ConcatUpperUpper(d, by_row[3], by_row[1]));
    hn::Store(hn::Add(hn::OddEvenBlocks(high, low),
                      hn::OddEvenBlocks(hn::SwapAdjacentBlocks(high), hn::SwapAdjacentBlocks(low))),
              d, scores[0]);
  } else if constexpr (kLanes == 8) {
    hn::Store(
        hn::Add(hn::ConcatLowerLower(d, by_row[1], by_row[0]), hn::ConcatUpperUpper(d, by_row[1], by_row[0])),
        d, scores[0]);
  } else {
    NARROWS_UNROLL
    for (int r = 0; r < kScoreRows; ++r) hn::Store(by_row[r], d, scores[r]);
  }
  if (there == kKeys) {
    NARROWS_UNROLL
    for (int r = 0; r < kRows; ++r) std::memcpy(score + r * lds, scores[r], sizeof(scores[r]));
  } else {
    for (int r = 0; r < kRows; ++r) std::copy_n(scores[r], there, score + r * lds);
  }
}

}  // namespace

void score_rows_f16(const f16_t* key, const int32_t* slot, int64_t n, const float* q, int64_t n_row,
                    int64_t head_dim, float* score, int64_t lds) {
  for (int64_t i = 0; i < n; i += kKeys) {
    const int64_t there = n - i < kKeys ? n - i : kKeys;
    const f16_t* k[kKeys];
    for (int64_t j = 0; j < kKeys; ++j) k[j] = key + slot[i + (j < there ? j : 0)] * head_dim;
    for (int64_t r = 0; r < n_row; r += kScoreRows) {
      const float* rows = q + r * head_dim;
      float* to = score + r * lds + i;
      const int64_t m = n_row - r;
      if (m == 1) {
        score_keys<1>(k, rows, head_dim, there, to, lds);
      } else if (m == 2 || kScoreRows == 2) {
        score_keys<2>(k, rows, head_dim, there, to, lds);
      } else if (m == 3) {
        score_keys<kScoreRows == 2 ? 2 : 3>(k, rows, head_dim, there, to, lds);
      } else {
        score_keys<kScoreRows>(k, rows, head_dim, there, to, lds);
      }
    }
  }
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
