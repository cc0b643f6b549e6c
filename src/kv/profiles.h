// The families of caches: a row each in profiles.cpp, and the only place outside the parser of `--kv` where
// one is told from another.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "kv/basis_file.h"
#include "kv/klt/klt_layer.h"
#include "kv/kv_layer.h"
#include "kv/layout.h"
#include "narrows/config.h"

namespace narrows {

class BlockPool;      // kv/f16/cuda/block_pool.h
class BlockSequence;  // kv/f16/cuda/block_pool.h
class KltCard;        // kv/klt/cuda/klt_card.h
class KltOnDevice;    // kv/klt/cuda/klt_card.h

/// What the caches of a model share on the GPU that the model is on; null: caches are the host's.
struct DeviceStores {
  std::shared_ptr<BlockPool> f16;
  std::shared_ptr<KltCard> klt;
};

/// Where the tokens of a cache go on a GPU, as its profile is; neither: to the host's memory.
struct DevicePlace {
  std::shared_ptr<BlockSequence> f16;
  std::shared_ptr<KltOnDevice> klt;

  explicit operator bool() const { return f16 != nullptr || klt != nullptr; }
};

/// What a cache must know of a layer of the model.
struct KvLayerSpec {
  AttentionShape shape;
  const kernels::RopeTable* rope = nullptr;  ///< outlives the cache; null where only bytes are asked for
  int64_t window = 0;                        ///< a query sees this many tokens, itself included; 0: all
  kernels::DeltaNetShape delta_net = {};     ///< a recurrent layer, without all of that
  int64_t n_rot = 0;                         ///< coordinates of a head that RoPE turns
};

/// A layer that is to be made.
struct KvOrder {
  int64_t index = 0;  ///< in the model
  const KvLayerSpec& spec;
  const KvProfile& profile;
  const WindowPlan& plan;
  const std::shared_ptr<const BasisFile>& basis;  ///< may be null
  const ValueWeightFn& value_weight;
  std::span<const std::unique_ptr<KvLayer>> made;  ///< the layers before it
  const DevicePlace& place;
};

/// Tokens of a layer, by where they are.
struct KvCounts {
  int64_t n = 0;  ///< all
  int64_t sinks = 0;
  int64_t in_pages = 0;
  int64_t recent = 0;
  bool encodes = false;    ///< it has what it encodes with
  bool segmented = false;  ///< see KvCache::create()
};

struct KvFamily {
  KvKind kind;
  /// Tokens that leave the recent window at a time; 0: none do.
  int64_t unit;
  /// Tokens that a layer of width D makes its own transforms from when there is no basis file; null: it needs
  /// none.
  int64_t (*tokens_for_codec)(int64_t width);
  /// May throw std::bad_alloc. invalid_file: the basis does not fit.
  Result<std::unique_ptr<KvLayer>> (*make)(const KvOrder& order);
  /// What a layer takes that holds so many tokens, by its layout; klt: at most.
  int64_t (*bytes)(const KvProfile& profile, const KvLayerSpec& layer, const KvCounts& counts);
  /// What a step over such a layer works in beside StepScratch; null: nothing worth counting.
  int64_t (*step_bytes)(const KvProfile& profile, const KvLayerSpec& layer, const KvCounts& counts,
                        int n_threads) = nullptr;
  /// Where a cache of such layers goes among the stores of a GPU: nowhere if they are the host's. Null: all
  /// are.
  DevicePlace (*place)(const DeviceStores& stores, const KvProfile& profile,
                       std::span<const KvLayerSpec> layers) = nullptr;
};

/// The family that keeps layer i of a model's n_layer: that of the profile, an exact one where the profile
/// leaves a layer dense, the ring of a window, or a recurrent layer's state.
const KvFamily& family_of(const KvProfile& profile, const KvLayerSpec& layer, int64_t i, int64_t n_layer);
const KvFamily& family_of(KvKind kind);
/// Where a cache of that profile goes on a GPU; nowhere if it has no stores or the family's layers are the
/// host's.
DevicePlace device_place(const DeviceStores& stores, const KvProfile& profile,
                         std::span<const KvLayerSpec> layers);

extern const KvFamily f16_family;
extern const KvFamily kivi_family;
extern const KvFamily klt_family;
extern const KvFamily sals_family;
extern const KvFamily ring_family;
extern const KvFamily recurrent_family;

/// Bytes of n exact tokens in blocks of so many.
int64_t exact_bytes(int64_t n, const AttentionShape& shape, int64_t block);
/// Of sinks, recent tokens and tokens in pages that stay exact; pages apart.
int64_t window_bytes(const KvCounts& counts, int64_t n_kept, const AttentionShape& shape);

}  // namespace narrows
