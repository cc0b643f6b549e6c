// Makes the layers of a profile, adds up their bytes, and says beforehand what they will take.
#include "cache/kv_cache.h"

#include <algorithm>
#include <new>

#include "cache/f16_layer.h"
#include "cache/kivi_layer.h"
#include "cache/klt_layer.h"
#include "cache/sals_layer.h"

namespace narrows {

namespace {

constexpr int64_t kF16 = sizeof(kernels::f16_t);
/// What transforms are made from in a cache with segments: with 512 the KL is half as large again
/// (docs/experiments.md), with more, shorter prompts would not be compressed.
constexpr int64_t kExactTokens = 2048;

Status check_shape(const AttentionShape& s, const kernels::RopeTable& rope) {
  const bool good = s.n_head > 0 && s.n_head_kv > 0 && s.n_head % s.n_head_kv == 0 && s.head_dim > 0 &&
                    s.head_dim <= kMaxHeadDim && rope.n_rot() >= 0 && rope.n_rot() <= s.head_dim &&
                    rope.n_rot() % 2 == 0;
  if (good) return {};
  return {StatusCode::unsupported,
          "attention of " + std::to_string(s.n_head) + " heads over " + std::to_string(s.n_head_kv) +
              " KV heads of " + std::to_string(s.head_dim) + " (" + std::to_string(rope.n_rot()) +
              " rotated) is not supported; head_dim may be " + std::to_string(kMaxHeadDim) + " at most"};
}

WindowPlan window_plan(const KvProfile& profile) {
  const int64_t unit = profile.kind == KvKind::klt    ? kPageTokens
                       : profile.kind == KvKind::kivi ? kKiviUnit
                                                      : kSalsUnit;
  WindowPlan plan;
  plan.n_sink = profile.n_sink;
  plan.n_recent = profile.n_recent;
  plan.unit = unit;
  return plan;
}

WindowPlan segmented_plan(const KvProfile& profile, int64_t width, bool has_basis) {
  WindowPlan plan = window_plan(profile);
  plan.segmented = true;
  plan.n_exact = exact_tokens(profile, width, has_basis);
  plan.n_exact_step = 2 * plan.n_exact;  // a short prompt's long answer; then its segments cannot come back
  return plan;
}

KltOptions klt_options(const KvProfile& profile, int64_t width) {
  // D / 8 coordinates find the same tokens as D / 4, but not fewer than 24 (docs/experiments.md).
  const int64_t rank = profile.rank > 0 ? profile.rank : std::max<int64_t>(24, width / 8);
  return {profile.key_rate, profile.value_rate, rank, profile.anchors};
}

/// Bytes of the klt pages and transforms of a layer, if every coordinate has bits: an upper bound, because
/// those without bits need neither scale nor transform.
struct KltBytes {
  int64_t page = 0;
  int64_t basis = 0;
};

KltBytes klt_bytes(const KvProfile& profile, int64_t n_head_kv, int64_t head_dim) {
  const int64_t width = n_head_kv * head_dim;
  const int64_t part = heads_of_part(n_head_kv, head_dim) * head_dim;
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
          (padded * part * kF16 + part * head_dim * kF16 + part * int64_t{sizeof(float)} + padded / 8 + 2) +
      (4 + width) * (klt_options(profile, width).n_index + 8 * width / part + 1) * int64_t{sizeof(float)};
  return bytes;
}

SalsLayout sals_layout(const KvProfile& profile, int64_t width) {
  return {width, profile.rank_divisor, profile.value_bits};
}

KiviLayout kivi_layout(const KvProfile& profile, int64_t width) {
  return {width, profile.key_bits, profile.value_bits};
}

/// The layer's basis in the file, sharing the file's ownership; null without a file.
Result<std::shared_ptr<const LayerBasis>> layer_basis(const std::shared_ptr<const BasisFile>& file,
                                                      int64_t layer, const SalsLayout& layout) {
  if (!file) return std::shared_ptr<const LayerBasis>();
  if (layer >= static_cast<int64_t>(file->layers.size())) {
    return Status{StatusCode::invalid_file, "the basis has no layer " + std::to_string(layer)};
  }
  const LayerBasis& basis = file->layers[static_cast<size_t>(layer)];
  if (basis.width != layout.width || basis.rank < layout.rank ||
      static_cast<int64_t>(basis.u.size()) != basis.width * basis.rank) {
    return Status{StatusCode::invalid_file,
                  "the basis of layer " + std::to_string(layer) + " has " + std::to_string(basis.rank) +
                      " vectors of width " + std::to_string(basis.width) + "; the profile needs " +
                      std::to_string(layout.rank) + " of width " + std::to_string(layout.width)};
  }
  return std::shared_ptr<const LayerBasis>(file, &basis);
}

int64_t exact_bytes(int64_t n, int64_t width, int64_t block) {
  return ceil_div(n, block) * block * width * 2 * kF16;
}

/// Bytes of a layer of kind `profile.kind` after append() of n tokens.
int64_t layer_bytes(const KvProfile& profile, const ModelInfo& model, int64_t n, bool segmented) {
  const int64_t n_head_kv = model.n_head_kv, head_dim = model.head_dim;
  const int64_t width = n_head_kv * head_dim;
  if (profile.kind == KvKind::f16) return exact_bytes(n, width, kDenseBlock);
  const WindowPlan plan = window_plan(profile);
  const bool sals = profile.kind == KvKind::sals;
  const bool klt = profile.kind == KvKind::klt;
  const bool encodes = segmented
                           ? n >= exact_tokens(profile, width, false)
                           : (!sals || n >= tokens_for_basis(width)) && (!klt || n >= tokens_for_klt(width));
  const int64_t n_sink = std::min(n, plan.n_sink);
  const int64_t in_pages = encodes ? plan.in_pages(n) : 0;
  int64_t page_bytes = 0;
  int64_t basis = 0;
  int64_t hot = 0;
  int64_t n_anchor = 0;
  if (klt) {
    const KltBytes bytes = klt_bytes(profile, n_head_kv, head_dim);
    page_bytes = bytes.page;
    basis = encodes ? bytes.basis : 0;
    // Rows and lists of seven words a token.
    hot = klt_hot_tokens(profile, in_pages, n) * n_head_kv * (head_dim * kF16 + 7 * int64_t{sizeof(int32_t)});
    n_anchor = profile.anchors * ceil_div(in_pages, kPageTokens);
    if (profile.anchors > 0)
      basis += ceil_div(std::max<int64_t>(0, n - n_sink - in_pages), kQueryStride) * model.n_head * head_dim *
               kF16;
  } else if (sals) {
    page_bytes = sals_layout(profile, width).bytes();
    basis = encodes ? width * sals_layout(profile, width).rank * int64_t{sizeof(float)} : 0;
  } else {
    page_bytes = kivi_layout(profile, width).bytes();
  }
  return exact_bytes(n_sink + n_anchor, width, kWindowBlock) +
         exact_bytes(n - n_sink - in_pages, width, kWindowBlock) +
         ceil_div(in_pages, kPageTokens) * page_bytes + basis + hot;
}

}  // namespace

int64_t klt_hot_tokens(const KvProfile& profile, int64_t n_in_pages, int64_t n_kv) {
  const bool all = profile.budget == KvProfile::kBudgetAll;
  const int64_t most = all ? KvProfile::kBudgetAt4K : profile.budget_at(n_kv);
  if (all && n_in_pages > most) return 0;
  return ceil_div(std::min(n_in_pages, most), kPageTokens) * kPageTokens;
}

Result<std::unique_ptr<KvCache>> KvCache::create(const ModelInfo& model, const KvProfile& profile,
                                                 const AttentionShape& shape, const kernels::RopeTable* rope,
                                                 std::shared_ptr<const BasisFile> basis,
                                                 ValueWeightFn value_weight, bool segmented) {
  if (Status s = check_shape(shape, *rope); !s.ok()) return s;
  if (model.n_layer < 1) return Status{StatusCode::invalid_argument, "a cache needs at least one layer"};
  try {
    std::unique_ptr<KvCache> cache(new KvCache());
    cache->profile_ = profile;
    cache->shape_ = shape;
    cache->segmented_ = segmented;
    const WindowPlan plan =
        segmented ? segmented_plan(profile, shape.width(), basis != nullptr) : window_plan(profile);
    std::shared_ptr<const DistanceAverage> distances;
    if (profile.kind == KvKind::klt) distances = std::make_shared<DistanceAverage>(*rope, shape.head_dim);
    for (int64_t i = 0; i < model.n_layer; ++i) {
      if (profile.layer_is_dense(i, model.n_layer)) {
        cache->layers_.push_back(std::make_unique<F16Layer>(shape, rope));
      } else if (profile.kind == KvKind::kivi) {
        cache->layers_.push_back(
            std::make_unique<KiviLayer>(shape, rope, plan, kivi_layout(profile, shape.width())));
      } else if (profile.kind == KvKind::klt) {
        auto klt = std::make_unique<KltLayer>(i, shape, rope, plan, klt_options(profile, shape.width()),
                                              distances, value_weight);
        if (basis && i < static_cast<int64_t>(basis->klt.size())) {
          if (Status s = klt->use_basis(basis->klt[static_cast<size_t>(i)]); !s.ok()) return s;
        }
        cache->layers_.push_back(std::move(klt));
      } else {
        const SalsLayout layout = sals_layout(profile, shape.width());
        auto own = layer_basis(basis, i, layout);
        if (!own.ok()) return own.status();
        cache->layers_.push_back(std::make_unique<SalsLayer>(shape, rope, plan, layout, std::move(*own)));
      }
    }
    return cache;
  } catch (const std::bad_alloc&) {
    return Status{StatusCode::out_of_memory, "no memory for an empty key/value cache"};
  }
}

CacheStats KvCache::stats() const {
  CacheStats stats;
  const int64_t f16_a_token = shape_.width() * 2 * kF16;
  stats.n_tokens = n_tokens();
  for (int64_t i = 0; i < n_layer(); ++i) {
    const LayerBytes bytes = layer(i).bytes();
    stats.bytes += bytes.total();
    stats.bytes_f16 += layer(i).n_tokens() * f16_a_token;
    if (profile_.layer_is_dense(i, n_layer())) continue;
    ++stats.n_layer_compressed;
    stats.bytes_compressed_layers += bytes.total();
    stats.bytes_f16_compressed_layers += layer(i).n_tokens() * f16_a_token;
    stats.bytes_pages += bytes.pages;
    stats.bytes_hot += bytes.hot;
    stats.bytes_f16_pages += bytes.n_tokens_in_pages * f16_a_token;
  }
  return stats;
}

void KvCache::use_workers(Workers* workers) {
  for (auto& layer : layers_) layer->use_workers(workers);
}

bool KvCache::wants_queries() const {
  return std::any_of(layers_.begin(), layers_.end(),
                     [](const auto& layer) { return layer->wants_queries(); });
}

bool KvCache::can_keep(int64_t n) const {
  return std::all_of(layers_.begin(), layers_.end(), [n](const auto& layer) { return layer->can_keep(n); });
}

void KvCache::keep(int64_t n) {
  for (auto& layer : layers_) layer->keep(n);
}

Status KvCache::share(const KvCache& from, int64_t n) {
  const bool alike = from.profile_.name == profile_.name && from.segmented_ == segmented_ &&
                     from.n_layer() == n_layer() && from.shape_.width() == shape_.width();
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
  if (profile.kind == KvKind::f16 || profile.kind == KvKind::kivi || has_basis)
    return profile.n_sink + kSegmentTokens;
  const int64_t wanted = profile.kind == KvKind::klt ? tokens_for_klt(width) : tokens_for_basis(width);
  return profile.n_sink + ceil_div(std::max(kExactTokens, wanted), kSegmentTokens) * kSegmentTokens;
}

void KvCache::clear() {
  for (auto& layer : layers_) layer->clear();
}

int64_t cache_bytes_estimate(const ModelInfo& model, const KvProfile& profile, int64_t n_tokens,
                             bool segmented) {
  KvProfile dense = profile;
  dense.kind = KvKind::f16;
  int64_t total = 0;
  for (int64_t i = 0; i < model.n_layer; ++i) {
    total +=
        layer_bytes(profile.layer_is_dense(i, model.n_layer) ? dense : profile, model, n_tokens, segmented);
  }
  return total;
}

}  // namespace narrows
