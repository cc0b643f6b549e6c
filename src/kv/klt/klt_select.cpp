// Stage 2 of a sparse klt step: scores to probabilities over the whole cache, summed over the query heads of
// a KV head, and the tokens to read. Most tokens cannot matter, however many they are, and are dropped on
// sight; the rest are candidates, few enough that passes over them find the threshold by halving.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kv/klt/klt_work.h"

namespace narrows {

using kernels::ops;

namespace {

/// Positive floats are in the order of their bits; a search for a threshold halves that range.
float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

/// Finer than this, an eighth of an octave, the search for a mass does not go: a few tokens more do no harm.
constexpr uint32_t kMassStep = 1U << 20;

/// Above every sum of probabilities over a group.
constexpr uint32_t kTop = 0x46000000;  // 8192

/// Attention that may be left out, summed over the group.
double may_lose(const KltLayer& layer, const KvProfile& profile) {
  return (1 - profile.mass) * static_cast<double>(layer.shape().group());
}

/// All tokens below it together are no more than what may be lost.
float floor_of(const KltLayer& layer, const KvProfile& profile) {
  const auto n = static_cast<double>(std::max<int64_t>(1, layer.n_in_pages()));
  return static_cast<float>(may_lose(layer, profile) / n);
}

/// Factors [n_head, 2 kSlices] that make each slice's numbers probabilities; 0 for an empty slice.
void weigh_slices(const AttentionShape& shape, const KltWork& work, float* weight) {
  for (int64_t h = 0; h < shape.n_head; ++h, weight += 2 * kSlices) {
    const float* max = work.part_max.data() + h * 2 * kSlices;
    const float* sum = work.part_sum.data() + h * 2 * kSlices;
    float top = 0;
    float unused = 0;
    std::copy_n(max, 2 * kSlices, weight);
    ops().softmax_part(weight, 2 * kSlices, &top, &unused);
    double total = 0;
    for (int i = 0; i < 2 * kSlices; ++i) total += static_cast<double>(weight[i] * sum[i]);
    const float inverse = total > 0 ? static_cast<float>(1 / total) : 0.0F;
    for (int i = 0; i < 2 * kSlices; ++i) weight[i] = sum[i] > 0 ? weight[i] * inverse : 0.0F;
  }
}

/// Moves the candidates of a KV head's slices together; returns how many.
int64_t join_candidates(const KltLayer& layer, int64_t head_kv, KltWork& work) {
  int32_t* token = work.candidate.data() + head_kv * work.ld;
  float* pooled = work.pooled.data() + head_kv * work.ld;
  int64_t n = 0;
  for (int i = 0; i < kSlices; ++i) {
    const int64_t from = part_of(layer.n_page(), i, kSlices).begin * kPageTokens;
    const int64_t count = work.n_candidate[static_cast<size_t>(head_kv * kSlices + i)];
    if (from != n) {
      std::copy_n(token + from, count, token + n);
      std::copy_n(pooled + from, count, pooled + n);
    }
    n += count;
  }
  return n;
}

}  // namespace

void klt_pool(const KltLayer& layer, const KvProfile& profile, Part slices, KltWork& work,
              KltThread& thread) {
  const AttentionShape& shape = layer.shape();
  const int64_t group = shape.group();
  weigh_slices(shape, work, thread.slice_weight.data());
  const float floor = floor_of(layer, profile);
  for (int64_t i = slices.begin; i < slices.end; ++i) {
    const Part pages = part_of(layer.n_page(), static_cast<int>(i), kSlices);
    const int64_t first = pages.begin * kPageTokens;
    for (int64_t g = 0; g < shape.n_head_kv; ++g) {
      for (int64_t r = 0; r < group; ++r)
        thread.weight[r] = thread.slice_weight[(g * group + r) * 2 * kSlices + i];
      work.n_candidate[static_cast<size_t>(g * kSlices + i)] = ops().pool_candidates(
          work.scores.data() + g * group * work.ld + first, work.ld, group, thread.weight.data(),
          (pages.end - pages.begin) * kPageTokens, floor, static_cast<int32_t>(first),
          work.candidate.data() + g * work.ld + first, work.pooled.data() + g * work.ld + first);
    }
  }
}

void klt_select(const KltLayer& layer, const KvProfile& profile, int64_t budget, int64_t head_kv,
                KltWork& work, const KltThread& thread) {
  const int64_t group = layer.shape().group();
  double in_pages = 0;  // probability of all free tokens in pages
  for (int64_t h = head_kv * group; h < (head_kv + 1) * group; ++h) {
    for (int64_t i = h * 2 * kSlices; i < (h * 2 + 1) * kSlices; ++i)
      in_pages += static_cast<double>(thread.slice_weight[i] * work.part_sum[static_cast<size_t>(i)]);
  }
  const double wanted =
      profile.mass < 1 ? in_pages - may_lose(layer, profile) : std::numeric_limits<double>::infinity();

  const int64_t n = join_candidates(layer, head_kv, work);
  const int32_t* token = work.candidate.data() + head_kv * work.ld;
  const float* pooled = work.pooled.data() + head_kv * work.ld;
  int32_t* selected = work.selected.data() + head_kv * work.ld;
  int64_t& n_selected = work.n_selected[static_cast<size_t>(head_kv)];
  n_selected = 0;
  if (!(wanted > 0) || n == 0) return;

  // The highest threshold, on a grid of bits, that still holds what is wanted, or all candidates.
  int64_t count = n;
  uint32_t low = std::bit_cast<uint32_t>(floor_of(layer, profile)) / kMassStep * kMassStep;
  uint32_t high = kTop;  // what is wanted is held from low on (or by no threshold), and not from high
  const auto halve = [&](uint32_t step, auto&& enough) {
    while (high - low > step) {
      const uint32_t middle = (low + (high - low) / 2) / step * step;
      const uint32_t at = middle > low ? middle : low + step;
      double sum = 0;
      int64_t m = 0;
      ops().count_above(pooled, n, float_of(at), &m, &sum);
      if (enough(m, sum)) {
        low = at;
        count = m;
      } else {
        high = at;
      }
    }
  };
  halve(kMassStep, [&](int64_t, double sum) { return sum >= wanted; });
  int64_t n_equal = n;
  if (count > budget) {
    // Too many: the budget-th largest to the last bit, and of its equals the oldest.
    high = kTop;
    halve(1, [&](int64_t m, double) { return m >= budget; });
    int64_t above = 0;
    double sum = 0;
    ops().count_above(pooled, n, float_of(low + 1), &above, &sum);
    n_equal = budget - above;
  }
  n_selected = ops().keep_above(token, pooled, n, float_of(low), n_equal, selected);
}

}  // namespace narrows
