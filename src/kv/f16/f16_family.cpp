#include "kv/f16/cuda/cuda_f16_layer.h"
#include "kv/f16/f16_layer.h"
#include "kv/profiles.h"

namespace narrows {

const KvFamily f16_family = {
    .kind = KvKind::f16,
    .unit = 0,
    .tokens_for_codec = nullptr,
    .make = [](const KvOrder& order) -> Result<std::unique_ptr<KvLayer>> {
      if (order.place.f16 != nullptr) {
        return std::unique_ptr<KvLayer>(
            std::make_unique<CudaF16Layer>(order.spec.shape, order.spec.rope, order.index, order.place.f16));
      }
      return std::unique_ptr<KvLayer>(std::make_unique<F16Layer>(order.spec.shape, order.spec.rope));
    },
    .bytes = [](const KvProfile&, const KvLayerSpec& layer,
                const KvCounts& counts) { return exact_bytes(counts.n, layer.shape, kDenseBlock); },
    .place = [](const DeviceStores& stores, const KvProfile&, std::span<const KvLayerSpec>) -> DevicePlace {
      return {std::make_shared<BlockSequence>(stores.f16), nullptr};
    },
};

}  // namespace narrows
