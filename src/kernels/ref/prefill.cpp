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

/// One row. q is in base 2, as the kernels have it: its rounding depends on that.
template <float (*kRound)(float), bool kShift>
void attend_row(const PrefillRows& a, int64_t row) {
  const Tile at(a.head_dim);
  const auto* tiles = reinterpret_cast<const float*>(a.tiles);
  const float factor = a.scale * 1.44269504F;
  const float* q = a.q + row * a.ldq;
  const int64_t seen = a.window > 0 ? a.first + row + 1 - a.window : 0;
  const int64_t begin = std::max({a.begin, seen, int64_t{0}}), end = std::min(a.end, a.first + row + 1);
  const auto score = [&](int64_t j) {
    const float* tile = tiles + j / kPrefillTile * at.size;
    double sum = 0;
    for (int64_t d = 0; d < a.head_dim; ++d) {
      const float exact = q[d] * factor;
      sum += double{kRound(exact)} * double{tile[at.keys + j % kPrefillTile * a.head_dim + d]};
      if (kShift) sum += double{exact} * double{tile[at.mean + d]};
    }
    return sum;
  };
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t j = begin; j < end; ++j) {
    const double s = score(j);
    if (!(s <= top)) top = s;
  }
  auto* out = reinterpret_cast<double*>(a.scratch);
  std::fill_n(out, a.head_dim, 0.0);
  double total = 0;
  for (int64_t j = begin; j < end; ++j) {
    const double weight = double{kRound(static_cast<float>(std::exp2(score(j) - top)))};
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

}  // namespace

constinit const PrefillKernel kPrefillF32 = {tile_bytes, pack<same, false>, scratch_bytes,
                                             attend<same, false>};
constinit const PrefillKernel kPrefillBf16 = {tile_bytes, pack<round_to_bf16, false>, scratch_bytes,
                                              attend<round_to_bf16, false>};
constinit const PrefillKernel kPrefillBf16Shift = {tile_bytes, pack<round_to_bf16, true>, scratch_bytes,
                                                   attend<round_to_bf16, true>};

}  // namespace narrows::kernels::ref
