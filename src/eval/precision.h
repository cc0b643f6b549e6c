// What a precision of prefill attention costs, one head at a time, against attention in double on the same
// numbers: on the random benchmark of PASA (arXiv:2503.01873) and on the queries, keys and values of a loaded
// model, every layer and head. docs/half_precision.md says what the columns mean.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrows/engine.h"

namespace narrows {

struct PrecisionOptions {
  std::vector<PrefillAttention> kernels;  ///< empty: all, automatic excepted
  int64_t context = 2048;                 ///< tokens of the model's part; 0 leaves it out
  bool random = true;                     ///< the random benchmark too
  int n_threads = 0;                      ///< 0: one a core that the process may use
};

/// One kernel on one head.
struct PrecisionRow {
  std::string name;  ///< "uniform mean 30 amplitude 0.5 head_dim 64 length 1280", "layer 4 head 8"
  PrefillAttention kernel = PrefillAttention::f32;
  double rmse = 0;       ///< of the finite rows, relative to the root mean square of v; NaN if there is none
  int64_t nan_rows = 0;  ///< rows with NaN or infinity
  int64_t rows = 0;      ///< query rows judged
  int64_t head_dim = 0;
  int64_t length = 0;  ///< keys
  int64_t layer = -1;  ///< -1: random numbers
  int64_t head = -1;
  double qk_max = 0;          ///< largest |q.k| of the judged rows, before the softmax scale
  double qk_max_shifted = 0;  ///< the same with each key less the mean of its block of 128
  /// Mean over judged pairs of |q.k| / sum |q_i k_i|: 1 if all coordinates pull in one direction, about
  /// 1.25 / sqrt(head_dim) for independent ones. The paper's "resonance" of q and k along the head.
  double resonance = 0;
};

/// Ordered by case, then kernel; random cases first. invalid_argument if the text has fewer than `context`
/// tokens (both counts); errors of the prompt's own.
Result<std::vector<PrecisionRow>> measure_precision(const std::shared_ptr<const Model>& model,
                                                    std::span<const Token> text,
                                                    const PrecisionOptions& options,
                                                    const ProgressFn& progress = {});

// --- parts, for tests ---

/// One head: rows of q see keys up to their position.
struct PrecisionHead {
  int64_t head_dim = 0;
  int64_t n_key = 0;
  float scale = 0;
  std::vector<float> q;           ///< [n_row, head_dim], rotated
  std::vector<float> k, v;        ///< [n_key, head_dim], k rotated
  std::vector<int64_t> position;  ///< [n_row]; n_key or more: sees all
};

/// Rows for all kernels; name, layer and head are left to the caller.
std::vector<PrecisionRow> judge_head(const PrecisionHead& head, std::span<const PrefillAttention> kernels);

/// The random benchmark's case of this number, 0 <= number < random_cases(); returns its name. Inputs are
/// rounded to half, as the paper's are, so that no kernel pays for what it was given.
std::string random_case(int64_t number, PrecisionHead& head);
int64_t random_cases();

}  // namespace narrows
