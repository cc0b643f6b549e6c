// The inside of a Model. Seen by engine/, eval/, bench/ and calibrate/ only.
#pragma once

#include <memory>
#include <string>

#include "base/access.h"
#include "engine/executor_pool.h"
#include "model/plan.h"
#include "model/weights.h"
#include "narrows/engine.h"

namespace narrows {

struct ModelParts {
  explicit ModelParts(std::unique_ptr<ModelWeights> w)
      : weights(std::move(w)), plan(make_plan(*weights)), executors(weights->spec(), plan) {}

  const std::unique_ptr<ModelWeights> weights;
  const Plan plan;
  mutable ExecutorPool executors;  ///< has a lock of its own

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
