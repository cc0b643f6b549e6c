// The inside of a Model. Seen by engine/, eval/, bench/ and calibrate/ only.
#pragma once

#include <algorithm>
#include <memory>
#include <string>

#include "base/access.h"
#include "device/device.h"
#include "engine/executor_pool.h"
#include "exec/cuda/cuda_weights.h"
#include "kv/f16/cuda/block_pool.h"
#include "kv/klt/cuda/klt_card.h"
#include "kv/klt/value_weights.h"
#include "kv/profiles.h"
#include "model/plan.h"
#include "model/weights.h"
#include "narrows/engine.h"

namespace narrows {

struct ModelParts {
  explicit ModelParts(std::unique_ptr<ModelWeights> w)
      : weights(std::move(w)), plan(make_plan(*weights)), executors(weights->spec(), plan) {}

  /// Weights to a GPU, whose executors then do the work; before any is taken. Errors as
  /// CudaWeights::upload().
  Status move_to(std::shared_ptr<device::Device> device) {
    Result<std::unique_ptr<CudaWeights>> there = CudaWeights::upload(std::move(device), spec(), plan);
    if (!there.ok()) return there.status();
    on_device = std::move(*there);
    executors.use(on_device.get());
    if (can_keep_blocks()) {
      const AttentionSpec& a = spec().attention();
      stores = {std::make_shared<BlockPool>(on_device->device(), spec().n_layer(), a.n_head_kv, a.head_dim),
                std::make_shared<KltCard>(on_device->device(), a.n_head_kv, a.head_dim)};
    }
    return {};
  }
  /// Of a prompt whose cache is not one of f16 there: a layer at a time.
  std::shared_ptr<BlockSequence> layer_blocks() const {
    const AttentionSpec& a = spec().layers.front().attention;
    return std::make_shared<BlockSequence>(
        std::make_shared<BlockPool>(on_device->device(), 1, a.n_head_kv, a.head_dim));
  }
  /// True if f16 caches can lie on a GPU: heads of 64 or 128, the same in all layers.
  bool can_keep_blocks() const {
    const AttentionSpec& first = spec().attention();
    return std::all_of(spec().layers.begin(), spec().layers.end(), [&](const LayerSpec& l) {
      const AttentionSpec& a = l.attention;
      return (a.head_dim == 64 || a.head_dim == 128) && a.head_dim == first.head_dim &&
             a.n_head == first.n_head && a.n_head_kv == first.n_head_kv && a.window == 0;
    });
  }

  const std::unique_ptr<ModelWeights> weights;
  const Plan plan;
  std::unique_ptr<CudaWeights> on_device;  ///< null: the CPU computes
  DeviceStores stores;                     ///< of caches there; none: caches are the host's
  mutable ValueWeights value_weights;  ///< of klt caches that make their transforms; has a lock of its own
  mutable ExecutorPool executors;      ///< has a lock of its own

  const ModelSpec& spec() const { return weights->spec(); }
};

struct Model::Impl {
  std::string path;
  ModelInfo info;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<const ModelParts> parts;
};

inline const ModelParts& parts_of(const Model& model) { return *Access::impl(model).parts; }

}  // namespace narrows
