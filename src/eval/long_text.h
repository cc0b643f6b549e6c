// Does a cache's error grow while a long answer is written? f16 writes freely after a context, drawing its
// tokens; every profile is fed the same tokens, and its predictions are compared with f16's by position.
// docs/quality.md.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrows/engine.h"

namespace narrows {

struct LongTextOptions {
  int64_t context = 4096;
  int64_t tokens = 1000;  ///< written; the model's end tokens are not drawn
  int64_t samples = 1;    ///< texts, each after another part of the text
  int64_t n_bucket = 8;   ///< parts of the written text, at most as many as it has tokens
  std::vector<KvProfile> profiles;
  std::string basis_path;
  int n_threads = 0;
  PromptOptions prompt;
  uint32_t seed = 1;
  float temperature = 1;  ///< the model's own distribution: with less, small models soon repeat themselves
};

/// Positions from to - 1 behind the context.
struct LongTextBucket {
  int64_t from = 0, to = 0;
  double kl = 0;    ///< mean, nats
  double top1 = 0;  ///< share that agrees with f16 on the likeliest token
};

/// Mean KL of the last half over that of the first: 1 means no drift.
struct Drift {
  double ratio = 1;
  double low = 1, high = 1;  ///< 95%, see drift_of()
};

struct LongTextRow {
  std::string kv;
  double kl_mean = 0, top1 = 0;
  std::vector<LongTextBucket> buckets;
  Drift drift;
};

struct LongText {
  std::vector<LongTextRow> rows;   ///< the profiles in order, without f16
  std::vector<std::string> texts;  ///< that f16 wrote, UTF-8
};

/// invalid_argument if the text has no context tokens behind a first one (both counts), or a number is out of
/// range; what sessions refuse.
Result<LongText> measure_long_text(const std::shared_ptr<const Model>& model, std::span<const Token> text,
                                   const LongTextOptions& options, const ProgressFn& progress = {});

// --- parts, for tests ---

/// kl[sample][position]. The interval: bootstrap over blocks of 25 positions (errors of neighbours hang
/// together), drawn within each half of the positions, 10,000 times, from the same seed.
Drift drift_of(std::span<const std::vector<double>> kl);

}  // namespace narrows
