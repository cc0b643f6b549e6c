#include "kv/profiles.h"

namespace narrows {

const KvFamily& family_of(KvKind kind) {
  static const KvFamily* const families[] = {&f16_family, &kivi_family, &klt_family, &sals_family};
  for (const KvFamily* family : families) {
    if (family->kind == kind) return *family;
  }
  return f16_family;
}

const KvFamily& family_of(const KvProfile& profile, const KvLayerSpec& layer, int64_t i, int64_t n_layer) {
  if (layer.delta_net) return recurrent_family;
  if (layer.window > 0) return ring_family;
  return family_of(profile.layer_is_dense(i, n_layer) ? KvKind::f16 : profile.kind);
}

DevicePlace device_place(const DeviceStores& stores, const KvProfile& profile,
                         std::span<const KvLayerSpec> layers) {
  const KvFamily& family = family_of(profile.kind);
  if (stores.f16 == nullptr || family.place == nullptr) return {};
  return family.place(stores, profile, layers);
}

int64_t exact_bytes(int64_t n, const AttentionShape& shape, int64_t block) {
  return ceil_div(n, block) * block * shape.width() * 2 * int64_t{sizeof(kernels::f16_t)};
}

int64_t window_bytes(const KvCounts& counts, int64_t n_kept, const AttentionShape& shape) {
  return exact_bytes(counts.sinks + n_kept, shape, kWindowBlock) +
         exact_bytes(counts.recent, shape, kWindowBlock);
}

}  // namespace narrows
