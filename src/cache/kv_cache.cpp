// Makes the layers of a profile, adds up their bytes, and says beforehand what they will take.
#include "cache/kv_cache.h"

#include <new>

#include "cache/f16_layer.h"
#include "cache/kivi_layer.h"
#include "cache/sals_layer.h"

namespace narrows {

namespace {

constexpr int64_t kF16 = sizeof(kernels::f16_t);

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
  return {profile.n_sink, profile.n_recent, profile.kind == KvKind::kivi ? kKiviUnit : kSalsUnit};
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
int64_t layer_bytes(const KvProfile& profile, int64_t width, int64_t n) {
  if (profile.kind == KvKind::f16) return exact_bytes(n, width, kDenseBlock);
  const WindowPlan plan = window_plan(profile);
  const bool sals = profile.kind == KvKind::sals;
  const bool encodes = !sals || n >= tokens_for_basis(width);
  const int64_t n_sink = std::min(n, plan.n_sink);
  const int64_t in_pages = encodes ? plan.in_pages(n) : 0;
  const int64_t page_bytes = sals ? sals_layout(profile, width).bytes() : kivi_layout(profile, width).bytes();
  const int64_t basis =
      sals && encodes ? width * sals_layout(profile, width).rank * int64_t{sizeof(float)} : 0;
  return exact_bytes(n_sink, width, kWindowBlock) + exact_bytes(n - n_sink - in_pages, width, kWindowBlock) +
         ceil_div(in_pages, kPageTokens) * page_bytes + basis;
}

}  // namespace

Result<std::unique_ptr<KvCache>> KvCache::create(const ModelInfo& model, const KvProfile& profile,
                                                 const AttentionShape& shape, const kernels::RopeTable* rope,
                                                 std::shared_ptr<const BasisFile> basis) {
  if (Status s = check_shape(shape, *rope); !s.ok()) return s;
  if (model.n_layer < 1) return Status{StatusCode::invalid_argument, "a cache needs at least one layer"};
  try {
    std::unique_ptr<KvCache> cache(new KvCache());
    cache->profile_ = profile;
    cache->shape_ = shape;
    for (int64_t i = 0; i < model.n_layer; ++i) {
      if (profile.layer_is_dense(i, model.n_layer)) {
        cache->layers_.push_back(std::make_unique<F16Layer>(shape, rope));
      } else if (profile.kind == KvKind::kivi) {
        cache->layers_.push_back(std::make_unique<KiviLayer>(shape, rope, window_plan(profile),
                                                             kivi_layout(profile, shape.width())));
      } else {
        const SalsLayout layout = sals_layout(profile, shape.width());
        auto own = layer_basis(basis, i, layout);
        if (!own.ok()) return own.status();
        cache->layers_.push_back(
            std::make_unique<SalsLayer>(shape, rope, window_plan(profile), layout, std::move(*own)));
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
    stats.bytes_f16_pages += bytes.n_tokens_in_pages * f16_a_token;
  }
  return stats;
}

void KvCache::clear() {
  for (auto& layer : layers_) layer->clear();
}

int64_t cache_bytes_estimate(const ModelInfo& model, const KvProfile& profile, int64_t n_tokens) {
  const int64_t width = model.n_head_kv * model.head_dim;
  KvProfile dense = profile;
  dense.kind = KvKind::f16;
  int64_t total = 0;
  for (int64_t i = 0; i < model.n_layer; ++i) {
    total += layer_bytes(profile.layer_is_dense(i, model.n_layer) ? dense : profile, width, n_tokens);
  }
  return total;
}

}  // namespace narrows
