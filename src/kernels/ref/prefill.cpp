// Oracle: attention of a prompt by two passes over the keys, in double. Operands rounded to bfloat16 keep
// their roundings: what is left of a kernel's difference is the order of its sums.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/bf16.h"
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {
namespace {

float same(float x) { return x; }

/// Offsets in floats.
struct Tile {
  explicit Tile(int64_t head_dim)
      : values(kPrefillTile * head_dim), mean(2 * values), size(mean + head_dim) {}
  int64_t keys = 0;  ///< [kPrefillTile, head_dim], rounded, less the mean
  int64_t values;    ///< [kPrefillTile, head_dim], rounded
  int64_t mean;      ///< [head_dim]; 0 without a shift
  int64_t size;
};

int64_t tile_bytes(int64_t head_dim) { return Tile(head_dim).size * static_cast<int64_t>(sizeof(float)); }

int64_t scratch_bytes(int64_t head_dim) { return head_dim * static_cast<int64_t>(sizeof(double)); }

template <float (*kRound)(float), bool kShift>
void pack(const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t n, int64_t head_dim,
          float /*scale*/, std::byte* tile) {
  const Tile at(head_dim);
  auto* to = reinterpret_cast<float*>(tile);
  std::fill_n(to, at.size, 0.0F);
  for (int64_t d = 0; d < head_dim; ++d) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += k[j * ldk + d];
    const float mean = kShift ? static_cast<float>(sum / static_cast<double>(n)) : 0.0F;
    to[at.mean + d] = mean;
    for (int64_t j = 0; j < n; ++j) {
      to[at.keys + j * head_dim + d] = kRound(k[j * ldk + d] - mean);
      to[at.values + j * head_dim + d] = kRound(v[j * ldv + d]);
    }
  }
}

/// q.k of one row, in base 2. The rounding of q depends on that, as in the kernels.
template <float (*kRound)(float), bool kShift>
double score(const PrefillRows& a, int64_t row, int64_t j) {
  const Tile at(a.head_dim);
  const float* tile = reinterpret_cast<const float*>(a.tiles) + j / kPrefillTile * at.size;
  const float factor = a.scale * 1.44269504F;
  double sum = 0;
  for (int64_t d = 0; d < a.head_dim; ++d) {
    const float exact = a.q[row * a.ldq + d] * factor;
    sum += double{kRound(exact)} * double{tile[at.keys + j % kPrefillTile * a.head_dim + d]};
    if (kShift) sum += double{exact} * double{tile[at.mean + d]};
  }
  return sum;
}

/// The largest score of keys [begin, end) in tiles that are read; NaN if one is.
template <float (*kRound)(float), bool kShift>
double top_score(const PrefillRows& a, int64_t row, int64_t begin, int64_t end) {
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t j = begin; j < end; ++j) {
    if (a.skips(j / kPrefillTile)) continue;
    const double s = score<kRound, kShift>(a, row, j);
    if (!(s <= top)) top = s;
  }
  return top;
}

template <float (*kRound)(float), bool kShift>
void attend_row(const PrefillRows& a, int64_t row) {
  const Tile at(a.head_dim);
  const auto* tiles = reinterpret_cast<const float*>(a.tiles);
  const int64_t begin = a.seen_begin(row), end = a.seen_end(row);
  const double top = top_score<kRound, kShift>(a, row, begin, end);
  auto* out = reinterpret_cast<double*>(a.scratch);
  std::fill_n(out, a.head_dim, 0.0);
  double total = 0;
  for (int64_t j = begin; j < end; ++j) {
    if (a.skips(j / kPrefillTile)) continue;
    const double weight =
        double{kRound(static_cast<float>(std::exp2(score<kRound, kShift>(a, row, j) - top)))};
    total += weight;
    const float* value = tiles + j / kPrefillTile * at.size + at.values + j % kPrefillTile * a.head_dim;
    for (int64_t d = 0; d < a.head_dim; ++d) out[d] += weight * double{value[d]};
  }
  double inverse = total == 0 ? 0 : 1 / total;
  if (a.max != nullptr) {
    a.max[row] = static_cast<float>(top * std::log(2.0));
    a.sum[row] = static_cast<float>(total);
    inverse = 1;
  }
  for (int64_t d = 0; d < a.head_dim; ++d) a.out[row * a.ldo + d] = static_cast<float>(out[d] * inverse);
}

template <float (*kRound)(float), bool kShift>
void attend(const PrefillRows& a) {
  for (int64_t r = 0; r < a.n_row; ++r) attend_row<kRound, kShift>(a, r);
}

template <float (*kRound)(float), bool kShift>
void look(const PrefillRows& rows, float* share) {
  PrefillRows a = rows;
  a.skip = nullptr;
  const int64_t n_tile = (a.end + kPrefillTile - 1) / kPrefillTile;
  std::fill_n(share, n_tile * kLookRows, 0.0F);
  for (int64_t r = 0; r < a.n_row; ++r) {
    const int64_t begin = a.seen_begin(r), end = a.seen_end(r);
    const double top = top_score<kRound, kShift>(a, r, begin, end);
    double total = 0;
    for (int64_t t = begin / kPrefillTile; t * kPrefillTile < end; ++t) {
      double sum = 0;
      for (int64_t j = std::max(begin, t * kPrefillTile); j < std::min(end, (t + 1) * kPrefillTile); ++j)
        sum += std::exp2(score<kRound, kShift>(a, r, j) - top);
      share[t * kLookRows + r] = static_cast<float>(sum);
      total += sum;
    }
    if (total == 0) continue;  // NaN passes through
    for (int64_t t = 0; t < n_tile; ++t)
      share[t * kLookRows + r] = static_cast<float>(double{share[t * kLookRows + r]} / total);
  }
}

}  // namespace

constinit const PrefillKernel kPrefillF32 = {tile_bytes, pack<same, false>, scratch_bytes,
                                             attend<same, false>, look<same, false>};
constinit const PrefillKernel kPrefillBf16 = {tile_bytes, pack<round_to_bf16, false>, scratch_bytes,
                                              attend<round_to_bf16, false>, look<round_to_bf16, false>};
constinit const PrefillKernel kPrefillBf16Shift = {tile_bytes, pack<round_to_bf16, true>, scratch_bytes,
                                                   attend<round_to_bf16, true>, look<round_to_bf16, true>};

}  // namespace narrows::kernels::ref
