// Oracle of the half-precision kernels: the same algorithms, row by row and rounding by rounding, with sums
// inside a chunk in double. (What they are worth is measured against exact attention, prefill.cpp.)
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/pasa.h"
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

/// To half, from double: through float, as the machines that we follow do.
double half(double x) { return double{round_to_half(static_cast<float>(x))}; }

/// Offsets in floats.
struct HalfTile {
  explicit HalfTile(int64_t head_dim)
      : values(kPrefillTile * head_dim), mean(2 * values), size(mean + head_dim) {}
  int64_t keys = 0;  ///< [kPrefillTile, head_dim] halves, as the kind shifts and scales them
  int64_t values;    ///< [kPrefillTile, head_dim] halves
  int64_t mean;      ///< [head_dim], fp16_shift
  int64_t size;
};

int64_t tile_bytes(int64_t head_dim) { return HalfTile(head_dim).size * static_cast<int64_t>(sizeof(float)); }

/// Scores of a tile, then its weights; sums of values.
int64_t scratch_bytes(int64_t head_dim) {
  return (kPrefillTile + 2 * head_dim) * static_cast<int64_t>(sizeof(double));
}

template <PrefillKind kKind>
void pack(const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t n, int64_t head_dim, float scale,
          std::byte* tile) {
  const HalfTile at(head_dim);
  auto* to = reinterpret_cast<float*>(tile);
  std::fill_n(to, at.size, 0.0F);
  const PasaMatrix m = pasa_matrix(scale);
  for (int64_t d = 0; d < head_dim; ++d) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += k[j * ldk + d];
    const float mean =
        kKind == PrefillKind::fp16_shift ? static_cast<float>(sum / static_cast<double>(n)) : 0.0F;
    to[at.mean + d] = mean;
    for (int64_t j = 0; j < kPrefillTile; ++j) {
      float& key = to[at.keys + j * head_dim + d];
      if constexpr (kKind == PrefillKind::pasa) pasa_key(m, k, ldk, n, j, d, 1, &key);
      if (j >= n) continue;
      if constexpr (kKind == PrefillKind::fp16) key = round_to_half(k[j * ldk + d]);
      if constexpr (kKind == PrefillKind::fp16_shift) key = round_to_half((k[j * ldk + d] - mean) * scale);
      to[at.values + j * head_dim + d] = round_to_half(v[j * ldv + d]);
    }
  }
}

/// To half in one rounding, as one instruction of half arithmetic does: the float between is rounded to odd,
/// which leaves no tie where there was none.
double half_once(double x) {
  auto nearest = static_cast<float>(x);
  if (double{nearest} == x || !std::isfinite(nearest)) return double{round_to_half(nearest)};
  if (std::fabs(double{nearest}) > std::fabs(x)) nearest = std::nextafter(nearest, 0.0F);
  return double{round_to_half(std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) | 1U))};
}

/// A half-precision product of n terms as half arithmetic computes it: every sum rounded. fp16_shift adds up
/// chunks otherwise.
template <PrefillKind kKind, HalfSum kSum, class A, class B>
double native_product(int64_t n, A a, B b) {
  constexpr int64_t kFew = kSum == HalfSum::scores ? kNativeScores : kNativeValues;
  const int64_t chunk = kKind == PrefillKind::fp16_shift ? kFew : n;
  double sum = 0;
  for (int64_t c = 0; c < n; c += chunk) {
    double part = 0;
    for (int64_t i = c; i < std::min(n, c + chunk); ++i) part = half_once(part + a(i) * b(i));
    sum += part;
  }
  return sum;
}

/// The same by a matrix unit.
template <class A, class B>
double matrix_product(int64_t n, A a, B b) {
  double sum = 0;
  for (int64_t c = 0; c < n; c += kHalfChunk) {
    double part = 0;
    for (int64_t i = c; i < std::min(n, c + kHalfChunk); ++i) part += a(i) * b(i);
    sum = half(sum + part);
  }
  return sum;
}

template <PrefillKind kKind, bool kNative, HalfSum kSum, class A, class B>
double half_product(int64_t n, A a, B b) {
  if constexpr (kNative) return native_product<kKind, kSum>(n, a, b);
  return matrix_product(n, a, b);
}

struct RowState {
  double max = kNone;
  double sum = 0;
  double mean = 0;  ///< pasa
  double n_tile = 0;
};

/// What a tile's weights and the old outputs are multiplied with.
struct Factors {
  double old, now;
};

/// s [kPrefillTile] scores, then weights; [low, high) are seen.
template <PrefillKind kKind>
Factors update(double* s, int64_t low, int64_t high, double recovery, RowState& row) {
  double top = kNone, total = 0;
  for (int64_t j = 0; j < kPrefillTile; ++j) total += s[j];
  for (int64_t j = low; j < high; ++j) {
    if (!(s[j] <= top)) top = s[j];
  }
  const bool first = row.n_tile == 0;
  row.n_tile += 1;
  Factors f{1, 1};
  double new_max = first ? top : std::max(row.max, top), reference = new_max, mean = 0, move_now = 0,
         move_old = 0;
  if constexpr (kKind == PrefillKind::pasa) {
    const double row_mean = half(total / static_cast<double>(kPrefillTile));
    mean = half(row.mean + (row_mean - row.mean) / row.n_tile);
    move_now = half(recovery * half(row_mean - mean));
    move_old = first ? 0 : half(recovery * half(row.mean - mean));
    const double moved = half(top + move_now);
    new_max = first ? moved : std::max(half(row.max + move_old), moved);
    reference = top;
  }
  double sum = 0;
  for (int64_t j = 0; j < kPrefillTile; ++j) {
    const double difference = s[j] - reference;
    const bool rounded = kKind != PrefillKind::fp16_shift;
    s[j] = j >= low && j < high ? half(std::exp(rounded ? half(difference) : difference)) : 0;
    sum += s[j];
  }
  if constexpr (kKind == PrefillKind::pasa) {
    f.old = first ? 0 : half(std::exp(half(half(row.max - new_max) + move_old)));
    f.now = half(std::exp(half(half(top - new_max) + move_now)));
    row.sum = half(half(f.old * row.sum) + half(f.now * half(sum)));
  } else if constexpr (kKind == PrefillKind::fp16) {
    f.old = first ? 0 : half(std::exp(half(row.max - new_max)));
    row.sum = half(half(f.old * row.sum) + half(sum));
  } else {
    f.old = first ? 0 : std::exp(row.max - new_max);
    row.sum = f.old * row.sum + sum;
  }
  row.max = new_max;
  row.mean = mean;
  return f;
}

template <PrefillKind kKind, bool kNative>
void attend_row(const PrefillRows& a, int64_t r) {
  const HalfTile at(a.head_dim);
  const auto* tiles = reinterpret_cast<const float*>(a.tiles);
  const float* q = a.q + r * a.ldq;
  auto* s = reinterpret_cast<double*>(a.scratch);
  double* out = s + kPrefillTile;
  std::fill_n(out, a.head_dim, 0.0);
  const double recovery = double{pasa_matrix(a.scale).recovery}, divisor = double{round_to_half(1 / a.scale)};
  const int64_t begin = a.seen_begin(r), end = a.seen_end(r);
  const float* base = tiles + begin / kPrefillTile * at.size + at.mean;
  RowState row;
  for (int64_t t = begin / kPrefillTile; begin < end && t * kPrefillTile < end; ++t) {
    if (a.skips(t)) continue;
    const float* tile = tiles + t * at.size;
    double offset = 0;
    for (int64_t d = 0; d < a.head_dim && kKind == PrefillKind::fp16_shift; ++d)
      offset += double{q[d] * a.scale} * double{tile[at.mean + d] - base[d]};
    for (int64_t j = 0; j < kPrefillTile; ++j) {
      const float* key = tile + at.keys + j * a.head_dim;
      s[j] = half_product<kKind, kNative, HalfSum::scores>(
          a.head_dim, [&](int64_t d) { return double{round_to_half(q[d])}; },
          [&](int64_t d) { return double{key[d]}; });
      if (kKind == PrefillKind::fp16) s[j] = half(s[j] / divisor);
      s[j] += offset;
    }
    const int64_t low = std::max(begin - t * kPrefillTile, int64_t{0});
    const int64_t high = std::min(end - t * kPrefillTile, kPrefillTile);
    const Factors f = update<kKind>(s, low, high, recovery, row);
    for (int64_t d = 0; d < a.head_dim; ++d) {
      const double now = half_product<kKind, kNative, HalfSum::values>(
          kPrefillTile, [&](int64_t j) { return s[j]; },
          [&](int64_t j) { return double{tile[at.values + j * a.head_dim + d]}; });
      if constexpr (kKind == PrefillKind::fp16_shift) {
        out[d] = f.old * out[d] + now;
      } else {
        out[d] = half(half(f.old * out[d]) + half(f.now * now));
      }
    }
  }
  double factor = row.n_tile == 0 ? 0 : 1 / row.sum;
  if (a.max != nullptr) {
    double common = kKind == PrefillKind::pasa ? recovery * row.mean : 0;
    for (int64_t d = 0; d < a.head_dim && kKind == PrefillKind::fp16_shift; ++d)
      common += double{q[d] * a.scale} * double{base[d]};
    a.max[r] = static_cast<float>(row.max + common);
    a.sum[r] = static_cast<float>(row.sum);
    factor = 1;
  }
  for (int64_t d = 0; d < a.head_dim; ++d) a.out[r * a.ldo + d] = static_cast<float>(out[d] * factor);
}

template <PrefillKind kKind, bool kNative>
void attend(const PrefillRows& a) {
  for (int64_t r = 0; r < a.n_row; ++r) attend_row<kKind, kNative>(a, r);
}

template <PrefillKind kKind, bool kNative = false>
inline constexpr PrefillKernel kKernel = {tile_bytes, pack<kKind>, scratch_bytes, attend<kKind, kNative>,
                                          nullptr};

}  // namespace

constinit const PrefillKernel kPrefillFp16 = kKernel<PrefillKind::fp16>;
constinit const PrefillKernel kPrefillPasa = kKernel<PrefillKind::pasa>;
constinit const PrefillKernel kPrefillFp16Shift = kKernel<PrefillKind::fp16_shift>;
constinit const PrefillKernel kPrefillFp16Native = kKernel<PrefillKind::fp16, true>;
constinit const PrefillKernel kPrefillPasaNative = kKernel<PrefillKind::pasa, true>;
constinit const PrefillKernel kPrefillFp16ShiftNative = kKernel<PrefillKind::fp16_shift, true>;

}  // namespace narrows::kernels::ref
