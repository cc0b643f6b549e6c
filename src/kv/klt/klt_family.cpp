#include <algorithm>

#include "kv/klt/cuda/cuda_klt_layer.h"
#include "kv/klt/klt_layer.h"
#include "kv/klt/klt_work.h"
#include "kv/profiles.h"

namespace narrows {

int64_t klt_n_index(const KvProfile& profile, int64_t width) {
  // D / 8 coordinates find the same tokens as D / 4, but not fewer than 24 (docs/experiments.md).
  return profile.rank > 0 ? profile.rank : std::max<int64_t>(24, width / 8);
}

namespace {

constexpr int64_t kF16 = sizeof(kernels::f16_t);

KltOptions options_of(const KvProfile& profile, int64_t width) {
  return {profile.key_rate, profile.value_rate, klt_n_index(profile, width), profile.anchors};
}

/// Layers with one RoPE and head size share what it does to keys on average.
std::shared_ptr<const DistanceAverage> distances_of(const KvOrder& order) {
  for (const auto& other : order.made) {
    const auto* there = dynamic_cast<const CudaKltLayer*>(other.get());
    const auto* klt = there != nullptr ? &there->host() : dynamic_cast<const KltLayer*>(other.get());
    if (klt != nullptr && &klt->rope() == order.spec.rope &&
        klt->shape().head_dim == order.spec.shape.head_dim)
      return klt->distances();
  }
  return std::make_shared<DistanceAverage>(*order.spec.rope, order.spec.shape.head_dim);
}

Result<std::unique_ptr<KvLayer>> make(const KvOrder& order) {
  const AttentionShape& shape = order.spec.shape;
  auto layer = std::make_unique<KltLayer>(order.index, shape, order.spec.rope, order.plan, order.profile,
                                          options_of(order.profile, shape.width()), distances_of(order),
                                          order.value_weight);
  if (order.basis && order.index < static_cast<int64_t>(order.basis->klt.size())) {
    if (Status s = layer->use_basis(order.basis->klt[static_cast<size_t>(order.index)]); !s.ok()) return s;
  }
  if (order.place.klt != nullptr)
    return std::unique_ptr<KvLayer>(std::make_unique<CudaKltLayer>(std::move(layer), order.place.klt));
  return std::unique_ptr<KvLayer>(std::move(layer));
}

/// Bytes of the pages and transforms of a layer, if every coordinate has bits: an upper bound, because those
/// without bits need neither scale nor transform.
struct KltBytes {
  int64_t page = 0;
  int64_t basis = 0;
};

KltBytes klt_bytes(const KvProfile& profile, const AttentionShape& shape) {
  const int64_t width = shape.width();
  const int64_t part = heads_of_part(shape.n_head_kv, shape.head_dim) * shape.head_dim;
  const int64_t padded = ceil_div(part, kernels::kOctet) * kernels::kOctet;
  const auto bits = [part](double rate) {
    return static_cast<int64_t>(rate * static_cast<double>(part) / kernels::kOctet + 1e-9) * kernels::kOctet;
  };
  KltBytes bytes;
  bytes.page =
      kPageHeader +
      width / part * (2 * padded + kPageTokens * (bits(profile.key_rate) + bits(profile.value_rate)) / 8);
  bytes.basis =
      width / part * 2 *
          (padded * part * kF16 + part * shape.head_dim * kF16 + part * int64_t{sizeof(float)} + padded / 8 +
           2) +
      (4 + width) * (options_of(profile, width).n_index + 8 * width / part + 1) * int64_t{sizeof(float)};
  return bytes;
}

int64_t bytes(const KvProfile& profile, const KvLayerSpec& layer, const KvCounts& counts) {
  const AttentionShape& shape = layer.shape;
  const KltBytes parts = klt_bytes(profile, shape);
  const int64_t n_page = ceil_div(counts.in_pages, kPageTokens);
  // Rows and lists of seven words a token.
  const int64_t hot = klt_hot_tokens(profile, counts.in_pages, counts.n) * shape.n_head_kv *
                      (shape.head_dim * kF16 + 7 * int64_t{sizeof(int32_t)});
  const int64_t samples =
      profile.anchors > 0 ? ceil_div(counts.recent, kQueryStride) * shape.n_head * shape.head_dim * kF16 : 0;
  return window_bytes(counts, profile.anchors * n_page, shape) + n_page * parts.page +
         (counts.encodes ? parts.basis : 0) + samples + hot;
}

int64_t step_bytes(const KvProfile& profile, const KvLayerSpec& layer, const KvCounts& counts,
                   int n_threads) {
  if (counts.in_pages == 0) return 0;
  const int64_t n_rot = layer.rope != nullptr ? layer.rope->n_rot() : layer.shape.head_dim;
  const KltSizes sizes = KltSizes::of(layer.shape, n_rot, options_of(profile, layer.shape.width()).n_index);
  const int64_t n_read = std::min(counts.in_pages, profile.budget_at(counts.n));
  return klt_work_bytes(sizes, profile.block, counts.in_pages, n_read, n_threads);
}

}  // namespace

int64_t klt_hot_tokens(const KvProfile& profile, int64_t n_in_pages, int64_t n_kv) {
  const bool all = profile.budget == KvProfile::kBudgetAll;
  const int64_t most = all ? KvProfile::kBudgetAt4K : profile.budget_at(n_kv);
  if (all && n_in_pages > most) return 0;
  return ceil_div(std::min(n_in_pages, most), kPageTokens) * kPageTokens;
}

DevicePlace place(const DeviceStores& stores, const KvProfile& profile, std::span<const KvLayerSpec> layers) {
  const auto is_fit = [&](const KvLayerSpec& l) {
    return CudaKltLayer::can_be_on_device(profile, l.shape, l.n_rot);
  };
  if (!std::all_of(layers.begin(), layers.end(), is_fit)) return {};
  return {nullptr, std::make_shared<KltOnDevice>(stores.klt)};
}

const KvFamily klt_family = {
    .kind = KvKind::klt,
    .unit = kPageTokens,
    .tokens_for_codec = tokens_for_klt,
    .make = make,
    .bytes = bytes,
    .step_bytes = step_bytes,
    .place = place,
};

}  // namespace narrows
