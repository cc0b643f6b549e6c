// Stage 2 of a sparse klt step: scores to probabilities over the whole cache, summed over the query heads of
// a KV head, and the tokens to read. Most tokens cannot matter, however many they are, and are dropped on
// sight; the rest are candidates, few enough to be ranked by a histogram.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "decode/klt_work.h"

namespace narrows {

using kernels::ops;

namespace {

/// Bins by size, eight an octave (the exponent and three bits of a float), from the smallest normal number to
/// 2^9, which no sum of probabilities over a group reaches; smaller ones share bin 0.
constexpr int kBinShift = 20;
constexpr int kBins = 8 * (126 + 10);
constexpr uint32_t kFirstBin = 0x00800000;

int bin_of(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (bits < kFirstBin) return 0;
  return static_cast<int>(std::min<uint32_t>((bits - kFirstBin) >> kBinShift, kBins - 1));
}

/// Attention that may be left out, summed over the group.
double may_lose(const KltLayer& layer, const KvProfile& profile) {
  return (1 - profile.mass) * static_cast<double>(layer.shape().group());
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
              KltWork::Thread& thread) {
  const AttentionShape& shape = layer.shape();
  const int64_t group = shape.group();
  weigh_slices(shape, work, thread.slice_weight.data());
  // All tokens below it together are no more than what may be lost.
  const auto n = static_cast<double>(std::max<int64_t>(1, layer.n_in_pages()));
  const auto floor = static_cast<float>(may_lose(layer, profile) / n);
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
                KltWork& work, const KltWork::Thread& thread) {
  const int64_t group = layer.shape().group();
  double in_pages = 0;  // probability of all tokens in pages
  for (int64_t h = head_kv * group; h < (head_kv + 1) * group; ++h) {
    for (int64_t i = h * 2 * kSlices; i < (h * 2 + 1) * kSlices; ++i)
      in_pages += static_cast<double>(thread.slice_weight[i] * work.part_sum[static_cast<size_t>(i)]);
  }
  const double wanted =
      profile.mass < 1 ? in_pages - may_lose(layer, profile) : std::numeric_limits<double>::infinity();

  const int64_t n = join_candidates(layer, head_kv, work);
  const int32_t* token = work.candidate.data() + head_kv * work.ld;
  const float* pooled = work.pooled.data() + head_kv * work.ld;
  std::array<int32_t, kBins> count;
  std::array<float, kBins> mass;
  const auto lowest = n == 0 ? kBins : bin_of(*std::min_element(pooled, pooled + n));
  std::fill(count.begin() + lowest, count.end(), 0);
  std::fill(mass.begin() + lowest, mass.end(), 0.0F);
  for (int64_t i = 0; i < n; ++i) {
    const auto bin = static_cast<size_t>(bin_of(pooled[i]));
    ++count[bin];
    mass[bin] += pooled[i];
  }
  // Whole bins from the top, until enough is held or one is too large for the budget: of that one the best.
  int last = kBins;
  int64_t due = 0;  // of the last bin
  double held = 0;
  for (int64_t taken = 0; last > lowest && taken < budget && held < wanted; taken += due) {
    --last;
    const auto bin = static_cast<size_t>(last);
    due = std::min<int64_t>(count[bin], budget - taken);
    held += static_cast<double>(mass[bin]);
  }
  const auto better = [pooled](int32_t a, int32_t b) {
    return pooled[a] != pooled[b] ? pooled[a] > pooled[b] : a < b;
  };
  int32_t worst = -1;  // of the last bin's taken ones
  if (last < kBins && due < count[static_cast<size_t>(last)] && due > 0) {
    int32_t* in_bin = work.missing.data() + head_kv * work.ld;  // free until keys are held
    int64_t m = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (bin_of(pooled[i]) == last) in_bin[m++] = static_cast<int32_t>(i);
    }
    std::nth_element(in_bin, in_bin + due - 1, in_bin + m, better);
    worst = in_bin[due - 1];
  }
  int32_t* selected = work.selected.data() + head_kv * work.ld;
  int64_t n_selected = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int bin = bin_of(pooled[i]);
    if (bin < last || (bin == last && (due == 0 || (worst >= 0 && better(worst, static_cast<int32_t>(i))))))
      continue;
    selected[n_selected++] = token[i];
  }
  work.n_selected[static_cast<size_t>(head_kv)] = n_selected;
}

}  // namespace narrows
