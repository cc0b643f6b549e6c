// Distances between logits, in double.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace narrows::testing {

inline bool all_finite(std::span<const float> x) {
  return std::all_of(x.begin(), x.end(), [](float y) { return std::isfinite(y); });
}

/// Largest difference; infinite if the sizes differ or a number is not finite.
inline double max_difference(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size() || !all_finite(a) || !all_finite(b))
    return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i)
    worst = std::max(worst, std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return worst;
}

/// Largest difference over rows; 0 only if all numbers are equal.
inline double max_difference(const std::vector<std::vector<float>>& a,
                             const std::vector<std::vector<float>>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i)
    worst = std::max(worst, max_difference(std::span(a[i]), std::span(b[i])));
  return worst;
}

inline double standard_deviation(std::span<const float> x) {
  double sum = 0, square = 0;
  for (const float y : x) {
    sum += static_cast<double>(y);
    square += static_cast<double>(y) * static_cast<double>(y);
  }
  const auto n = static_cast<double>(x.size());
  return std::sqrt(std::max(0.0, square / n - sum / n * (sum / n)));
}

inline std::vector<double> log_softmax(std::span<const float> logits) {
  const double top = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
  std::vector<double> out;
  for (const float x : logits) out.push_back(static_cast<double>(x) - top - std::log(sum));
  return out;
}

/// KL divergence of the distribution of x to that of the reference, nats; infinite if a number is not finite.
inline double kl_divergence(std::span<const float> reference, std::span<const float> x) {
  if (reference.size() != x.size() || !all_finite(reference) || !all_finite(x))
    return std::numeric_limits<double>::infinity();
  const std::vector<double> p = log_softmax(reference), q = log_softmax(x);
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) sum += std::exp(p[i]) * (p[i] - q[i]);
  return sum;
}

inline int64_t argmax(std::span<const float> x) { return std::max_element(x.begin(), x.end()) - x.begin(); }

}  // namespace narrows::testing
