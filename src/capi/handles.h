// What the handles of the C API hold.
#pragma once

#include <memory>
#include <vector>

#include "narrows/engine.h"
#include "narrows/narrows.h"
#include "narrows/sampling.h"

struct narrows_model {
  std::shared_ptr<const narrows::Model> model;
};

struct narrows_session {
  std::unique_ptr<narrows::Session> session;
  std::vector<narrows::Token> saved;  ///< tokens of the file that it was loaded from
};

struct narrows_sampler {
  std::shared_ptr<const narrows::Model> model;  ///< its tokenizer outlives the sampler
  std::unique_ptr<narrows::Sampler> sampler;
};

struct narrows_batch {
  std::unique_ptr<narrows::DecodeBatch> batch;
  std::vector<narrows::Status> each;  ///< of the last step
};
