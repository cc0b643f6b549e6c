// Two caches on the same questions: how much the mean score differs, and how sure that is. docs/quality.md.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace narrows {

struct PairedDifference {
  double mean = 0;  ///< of the strata's mean differences
  double low = 0, high = 0;
  bool exact = false;  ///< the interval is not the bootstrap's, see below
  int64_t better = 0;  ///< differences above 0
  int64_t worse = 0;
};

/// strata[s]: score less reference score of each question of a task, in [-1, 1]. With 95% confidence: the
/// percentile bootstrap (Efron 1979), 10,000 samples of questions drawn within their tasks, always from the
/// same seed. Where in no task two differences differ (nothing changed, or there is one question) that would
/// be an interval without width: then the share p of questions that may be otherwise is bounded by Clopper
/// and Pearson (1934), p = 1 - .025^(1/n), and may be otherwise as far as it can, from -1 to 1. Strata
/// without a question count nothing; 0 to 0 if there are none.
PairedDifference paired_difference(std::span<const std::vector<double>> strata);

}  // namespace narrows
