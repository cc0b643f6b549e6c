#include "kv/kivi/kivi_layer.h"
#include "kv/profiles.h"

namespace narrows {

namespace {

KiviLayout layout_of(const KvProfile& profile, const AttentionShape& shape) {
  return {shape.width(), profile.key_bits, profile.value_bits};
}

}  // namespace

const KvFamily kivi_family = {
    .kind = KvKind::kivi,
    .unit = kKiviUnit,
    .tokens_for_codec = nullptr,
    .make = [](const KvOrder& order) -> Result<std::unique_ptr<KvLayer>> {
      const AttentionShape& shape = order.spec.shape;
      return std::unique_ptr<KvLayer>(
          std::make_unique<KiviLayer>(shape, order.spec.rope, order.plan, layout_of(order.profile, shape)));
    },
    .bytes =
        [](const KvProfile& profile, const KvLayerSpec& layer, const KvCounts& counts) {
          const AttentionShape& shape = layer.shape;
          return window_bytes(counts, 0, shape) +
                 ceil_div(counts.in_pages, kPageTokens) * layout_of(profile, shape).bytes();
        },
};

}  // namespace narrows
