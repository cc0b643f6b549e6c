// The cache of a whole session: one KvLayer a layer, made as the profile says, and its bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kv/basis_file.h"
#include "kv/kv_layer.h"
#include "kv/profiles.h"
#include "narrows/engine.h"

namespace narrows {

class KvCache {
 public:
  /// basis may be null: SALS layers then keep tokens exact until tokens_for_basis() of them are there,
  /// compute their own basis from tokens 4.. (the first few are attention sinks with outlying keys) and
  /// convert themselves. klt layers do the same; value_weight (may be empty for other profiles) serves them
  /// then. segmented: as WindowPlan says, for all layers.
  static Result<std::unique_ptr<KvCache>> create(std::span<const KvLayerSpec> layers,
                                                 const KvProfile& profile,
                                                 std::shared_ptr<const BasisFile> basis,
                                                 ValueWeightFn value_weight, bool segmented = false,
                                                 DevicePlace place = {});

  KvLayer& layer(int64_t i) { return *layers_[static_cast<size_t>(i)]; }
  const KvLayer& layer(int64_t i) const { return *layers_[static_cast<size_t>(i)]; }
  int64_t n_layer() const { return static_cast<int64_t>(layers_.size()); }
  const KvProfile& profile() const { return profile_; }
  /// The tokens of all layers on a GPU; neither: they are the host's.
  const DevicePlace& place() const { return place_; }
  bool is_on_device() const { return place_.f16 != nullptr || place_.klt != nullptr; }
  /// True if both lie in the same way: their sessions can take a step together.
  bool lies_like(const KvCache& other) const {
    return (place_.f16 == nullptr) == (other.place_.f16 == nullptr) &&
           (place_.klt == nullptr) == (other.place_.klt == nullptr);
  }
  /// True once a GPU has not given back what it holds.
  bool is_lost() const;
  /// Before a step: what its layers encode, if they have their transforms, is encoded here by all workers at
  /// once. Errors are found again by KvLayer::begin_step().
  void encode_together(Workers& workers);
  int64_t n_tokens() const { return layers_.front()->n_tokens(); }
  CacheStats stats() const;
  /// Of stats().bytes those that the memory ledger knows of already.
  int64_t bytes_in_stores() const;
  void use_workers(Workers* workers);  ///< see KvLayer
  /// True if a layer still gathers statistics of queries.
  bool wants_queries() const;
  void clear();

  // As KvLayer has them, for all layers. share(): same profile, shapes and `segmented`.
  bool goes_back_anywhere() const;
  bool can_keep(int64_t n) const;
  void keep(int64_t n);
  Status share(const KvCache& from, int64_t n);

 private:
  DevicePlace place_;
  KvProfile profile_;
  bool segmented_ = false;
  std::vector<std::unique_ptr<KvLayer>> layers_;
  std::vector<bool> compressed_;  ///< a layer: it encodes what leaves its recent tokens
};

/// First tokens of a cache with segments that are exact until their end is sealed: n_sink and 2,048, or as
/// many as the profile's transforms ask for; only a segment if there is nothing to wait for. width: the
/// largest of the layers.
int64_t exact_tokens(const KvProfile& profile, int64_t width, bool has_basis);

/// What the cache of n_tokens takes by its layout, whole model, own basis included; what stats().bytes will
/// show (klt: at most). segmented: as KvCache::create(), without a basis file.
int64_t kv_bytes_estimate(std::span<const KvLayerSpec> layers, const KvProfile& profile, int64_t n_tokens,
                          bool segmented = false);

/// The same while no layer has encoded anything yet.
int64_t kv_exact_bytes(std::span<const KvLayerSpec> layers, const KvProfile& profile, int64_t n_tokens);

/// What a step over such a cache of n_tokens works in beside StepScratch, the most of its layers.
int64_t kv_step_bytes(std::span<const KvLayerSpec> layers, const KvProfile& profile, int64_t n_tokens,
                      int n_threads);

}  // namespace narrows
