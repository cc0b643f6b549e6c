// Makes the layers of a profile, adds up their bytes, and says beforehand what they will take.
#include "kv/kv_cache.h"

#include <algorithm>
#include <new>

#include "kv/f16/cuda/block_pool.h"
#include "kv/klt/cuda/cuda_klt_layer.h"

namespace narrows {

namespace {

/// What transforms are made from in a cache with segments: with 512 the KL is half as large again
/// (docs/experiments.md), with more, shorter prompts would not be compressed.
constexpr int64_t kExactTokens = 2048;

Status check_shape(const KvLayerSpec& layer) {
  if (layer.delta_net) return {};
  const AttentionShape& s = layer.shape;
  const kernels::RopeTable& rope = *layer.rope;
  const bool good = s.n_head > 0 && s.n_head_kv > 0 && s.n_head % s.n_head_kv == 0 && s.head_dim > 0 &&
                    s.head_dim <= kMaxHeadDim && rope.n_rot() >= 0 && rope.n_rot() <= s.head_dim &&
                    rope.n_rot() % 2 == 0;
  if (good) return {};
  return {StatusCode::unsupported,
          "attention of " + std::to_string(s.n_head) + " heads over " + std::to_string(s.n_head_kv) +
              " KV heads of " + std::to_string(s.head_dim) + " (" + std::to_string(rope.n_rot()) +
              " rotated) is not supported; head_dim may be " + std::to_string(kMaxHeadDim) + " at most"};
}

int64_t most_width(std::span<const KvLayerSpec> layers) {
  int64_t width = 0;
  for (const KvLayerSpec& layer : layers) width = std::max(width, layer.shape.width());
  return width;
}

WindowPlan window_plan(const KvProfile& profile) {
  WindowPlan plan;
  plan.n_sink = profile.n_sink;
  plan.n_recent = profile.n_recent;
  plan.unit = family_of(profile.kind).unit;
  return plan;
}

WindowPlan segmented_plan(const KvProfile& profile, int64_t width, bool has_basis) {
  WindowPlan plan = window_plan(profile);
  plan.segmented = true;
  plan.n_exact = exact_tokens(profile, width, has_basis);
  plan.n_exact_step = 2 * plan.n_exact;  // a short prompt's long answer; then its segments cannot come back
  return plan;
}

/// Where a layer's tokens are after append() of n, without a basis file. n_exact: of a cache with segments,
/// else 0.
KvCounts count_tokens(const KvFamily& family, const KvProfile& profile, int64_t width, int64_t n,
                      int64_t n_exact) {
  KvCounts counts{.n = n, .segmented = n_exact > 0};
  if (family.unit == 0) return counts;
  const int64_t least = n_exact > 0 ? n_exact : family.tokens_for_codec ? family.tokens_for_codec(width) : 0;
  counts.encodes = n >= least;
  counts.sinks = std::min(n, profile.n_sink);
  counts.in_pages = counts.encodes ? window_plan(profile).in_pages(n) : 0;
  counts.recent = n - counts.sinks - counts.in_pages;
  return counts;
}

}  // namespace

Result<std::unique_ptr<KvCache>> KvCache::create(std::span<const KvLayerSpec> layers,
                                                 const KvProfile& profile,
                                                 std::shared_ptr<const BasisFile> basis,
                                                 ValueWeightFn value_weight, bool segmented,
                                                 DevicePlace place) {
  if (layers.empty()) return Status{StatusCode::invalid_argument, "a cache needs at least one layer"};
  for (const KvLayerSpec& layer : layers) {
    if (Status s = check_shape(layer); !s.ok()) return s;
  }
  try {
    std::unique_ptr<KvCache> cache(new KvCache());
    cache->profile_ = profile;
    cache->segmented_ = segmented;
    cache->place_ = std::move(place);
    const WindowPlan plan =
        segmented ? segmented_plan(profile, most_width(layers), basis != nullptr) : window_plan(profile);
    const auto n_layer = static_cast<int64_t>(layers.size());
    for (int64_t i = 0; i < n_layer; ++i) {
      const KvLayerSpec& spec = layers[static_cast<size_t>(i)];
      const KvOrder order{i, spec, profile, plan, basis, value_weight, cache->layers_, cache->place_};
      const KvFamily& family = family_of(profile, spec, i, n_layer);
      auto layer = family.make(order);
      if (!layer.ok()) return layer.status();
      cache->compressed_.push_back(family.unit > 0);
      cache->layers_.push_back(std::move(*layer));
    }
    return cache;
  } catch (const std::bad_alloc&) {
    return Status{StatusCode::out_of_memory, "no memory for an empty key/value cache"};
  }
}

CacheStats KvCache::stats() const {
  CacheStats stats;
  stats.n_tokens = n_tokens();
  for (int64_t i = 0; i < n_layer(); ++i) {
    const LayerBytes bytes = layer(i).bytes();
    const int64_t f16_a_token = layer(i).shape().width() * 2 * int64_t{sizeof(kernels::f16_t)};
    stats.bytes += bytes.total();
    stats.bytes_f16 += layer(i).n_tokens() * f16_a_token;
    if (!compressed_[static_cast<size_t>(i)]) continue;
    ++stats.n_layer_compressed;
    stats.bytes_compressed_layers += bytes.total();
    stats.bytes_f16_compressed_layers += layer(i).n_tokens() * f16_a_token;
    stats.bytes_pages += bytes.pages;
    stats.bytes_hot += bytes.hot;
    stats.bytes_f16_pages += bytes.n_tokens_in_pages * f16_a_token;
  }
  return stats;
}

int64_t KvCache::bytes_in_stores() const {
  int64_t bytes = 0;
  for (const auto& layer : layers_) bytes += layer->bytes().in_stores();
  return bytes;
}

void KvCache::use_workers(Workers* workers) {
  for (auto& layer : layers_) layer->use_workers(workers);
}

bool KvCache::wants_queries() const {
  return std::any_of(layers_.begin(), layers_.end(),
                     [](const auto& layer) { return layer->wants_queries(); });
}

bool KvCache::goes_back_anywhere() const {
  return std::all_of(layers_.begin(), layers_.end(),
                     [](const auto& layer) { return layer->goes_back_anywhere(); });
}

bool KvCache::is_lost() const {
  return (place_.f16 != nullptr && place_.f16->lost()) || (place_.klt != nullptr && place_.klt->lost());
}

void KvCache::encode_together(Workers& workers) {
  if (place_.klt == nullptr) return;
  std::vector<CudaKltLayer*> encoding;
  for (auto& layer : layers_) {
    auto& there = static_cast<CudaKltLayer&>(*layer);
    // A device that does not answer is told of by the step.
    if (there.encodes_next() && there.fetch().ok()) encoding.push_back(&there);
  }
  workers.for_each(std::ssize(encoding),
                   [&](int64_t i) { encoding[static_cast<size_t>(i)]->encode_alone(); });
}

bool KvCache::can_keep(int64_t n) const {
  return std::all_of(layers_.begin(), layers_.end(), [n](const auto& layer) { return layer->can_keep(n); });
}

void KvCache::keep(int64_t n) {
  for (auto& layer : layers_) layer->keep(n);
}

Status KvCache::share(const KvCache& from, int64_t n) {
  const bool alike =
      from.profile_.name == profile_.name && from.segmented_ == segmented_ && from.n_layer() == n_layer() &&
      std::equal(layers_.begin(), layers_.end(), from.layers_.begin(),
                 [](const auto& a, const auto& b) { return a->shape().width() == b->shape().width(); });
  if (!alike || !from.can_keep(n)) return {StatusCode::internal, "caches that differ cannot share pages"};
  for (int64_t i = 0; i < n_layer(); ++i) {
    if (Status s = layer(i).share(from.layer(i), n); !s.ok()) {
      clear();
      return s;
    }
  }
  return {};
}

int64_t exact_tokens(const KvProfile& profile, int64_t width, bool has_basis) {
  const KvFamily& family = family_of(profile.kind);
  if (has_basis || family.tokens_for_codec == nullptr) return profile.n_sink + kSegmentTokens;
  const int64_t wanted = std::max(kExactTokens, family.tokens_for_codec(width));
  return profile.n_sink + ceil_div(wanted, kSegmentTokens) * kSegmentTokens;
}

void KvCache::clear() {
  for (auto& layer : layers_) layer->clear();
}

int64_t kv_bytes_estimate(std::span<const KvLayerSpec> layers, const KvProfile& profile, int64_t n_tokens,
                          bool segmented) {
  const int64_t n_exact = segmented ? exact_tokens(profile, most_width(layers), false) : 0;
  const auto n_layer = static_cast<int64_t>(layers.size());
  int64_t total = 0;
  for (int64_t i = 0; i < n_layer; ++i) {
    const KvLayerSpec& layer = layers[static_cast<size_t>(i)];
    const KvFamily& family = family_of(profile, layer, i, n_layer);
    total +=
        family.bytes(profile, layer, count_tokens(family, profile, layer.shape.width(), n_tokens, n_exact));
  }
  return total;
}

int64_t kv_exact_bytes(std::span<const KvLayerSpec> layers, const KvProfile& profile, int64_t n_tokens) {
  KvProfile exact = profile;
  exact.kind = KvKind::f16;
  return kv_bytes_estimate(layers, exact, n_tokens, true);
}

int64_t kv_step_bytes(std::span<const KvLayerSpec> layers, const KvProfile& profile, int64_t n_tokens,
                      int n_threads) {
  const auto n_layer = static_cast<int64_t>(layers.size());
  int64_t most = 0;
  for (int64_t i = 0; i < n_layer; ++i) {
    const KvLayerSpec& layer = layers[static_cast<size_t>(i)];
    const KvFamily& family = family_of(profile, layer, i, n_layer);
    if (family.step_bytes == nullptr) continue;
    const KvCounts counts = count_tokens(family, profile, layer.shape.width(), n_tokens, 0);
    most = std::max(most, family.step_bytes(profile, layer, counts, n_threads));
  }
  return most;
}

}  // namespace narrows
