// The bootstrap's draws are made of the generator's own numbers, which are the same everywhere.
#include "eval/task/paired.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace narrows {

namespace {

constexpr size_t kSamples = 10000;
constexpr double kTail = 0.025;

double mean(const std::vector<double>& x) {
  double sum = 0;
  for (const double y : x) sum += y;
  return sum / static_cast<double>(x.size());
}

}  // namespace

PairedDifference paired_difference(std::span<const std::vector<double>> strata) {
  PairedDifference d;
  double n_strata = 0;
  size_t fewest = 0;
  for (const std::vector<double>& stratum : strata) {
    if (stratum.empty()) continue;
    ++n_strata;
    fewest = fewest == 0 ? stratum.size() : std::min(fewest, stratum.size());
    d.mean += mean(stratum);
    for (const double x : stratum) {
      d.better += x > 0 ? 1 : 0;
      d.worse += x < 0 ? 1 : 0;
    }
  }
  if (n_strata == 0) return d;
  d.mean /= n_strata;
  const auto alike = [](const std::vector<double>& x) {
    return std::all_of(x.begin(), x.end(), [&](double y) { return y == x.front(); });
  };
  if (std::all_of(strata.begin(), strata.end(), alike)) {
    // With unequal numbers of questions those of the smallest count: it weighs as much as the others.
    d.exact = true;
    const double p = 1 - std::pow(kTail, 1 / (n_strata * static_cast<double>(fewest)));
    d.low = d.mean - p * (d.mean + 1);
    d.high = d.mean + p * (1 - d.mean);
    return d;
  }
  std::mt19937 random(1);
  std::vector<double> means(kSamples, 0.0);
  for (double& sample : means) {
    for (const std::vector<double>& stratum : strata) {
      if (stratum.empty()) continue;
      double sum = 0;
      for (size_t i = 0; i < stratum.size(); ++i) sum += stratum[random() % stratum.size()];
      sample += sum / static_cast<double>(stratum.size()) / n_strata;
    }
  }
  std::sort(means.begin(), means.end());
  const auto cut = static_cast<size_t>(kTail * static_cast<double>(kSamples));
  d.low = means[cut];
  d.high = means[kSamples - 1 - cut];
  return d;
}

}  // namespace narrows
