#include <string>

#include "kv/profiles.h"
#include "kv/sals/sals_layer.h"

namespace narrows {

namespace {

SalsLayout layout_of(const KvProfile& profile, const AttentionShape& shape) {
  return {shape.width(), profile.rank_divisor, profile.value_bits};
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

Result<std::unique_ptr<KvLayer>> make(const KvOrder& order) {
  const SalsLayout layout = layout_of(order.profile, order.spec.shape);
  auto basis = layer_basis(order.basis, order.index, layout);
  if (!basis.ok()) return basis.status();
  return std::unique_ptr<KvLayer>(std::make_unique<SalsLayer>(order.spec.shape, order.spec.rope, order.plan,
                                                              order.profile, layout, std::move(*basis)));
}

int64_t bytes(const KvProfile& profile, const KvLayerSpec& layer, const KvCounts& counts) {
  const AttentionShape& shape = layer.shape;
  const SalsLayout layout = layout_of(profile, shape);
  const int64_t basis = counts.encodes ? layout.width * layout.rank * int64_t{sizeof(float)} : 0;
  return window_bytes(counts, 0, shape) + ceil_div(counts.in_pages, kPageTokens) * layout.bytes() + basis;
}

/// A score, a place among the selected and the selection's own work, a token in pages.
int64_t step_bytes(const KvProfile& /*profile*/, const KvLayerSpec& /*layer*/, const KvCounts& counts,
                   int /*n_threads*/) {
  const int64_t room = ceil_div(counts.in_pages, kPageTokens) * kPageTokens;
  return room * int64_t{sizeof(float) + sizeof(int32_t)} + kernels::select_scratch_bytes(room);
}

}  // namespace

const KvFamily sals_family = {
    .kind = KvKind::sals,
    .unit = kSalsUnit,
    .tokens_for_codec = tokens_for_basis,
    .make = make,
    .bytes = bytes,
    .step_bytes = step_bytes,
};

}  // namespace narrows
