// Plain sums: a vocabulary has some ten thousand tokens.
#include "eval/divergence.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace narrows {

bool log_softmax(std::span<const float> logits, std::vector<double>& out) {
  out.resize(logits.size());
  double top = -1e300;
  for (const float x : logits) {
    if (!std::isfinite(x)) return false;
    top = std::max(top, static_cast<double>(x));
  }
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
  const double shift = top + std::log(sum);
  for (size_t i = 0; i < logits.size(); ++i) out[i] = static_cast<double>(logits[i]) - shift;
  return true;
}

double divergence(const std::vector<double>& reference, const std::vector<double>& lp) {
  double sum = 0;
  for (size_t i = 0; i < lp.size(); ++i) sum += std::exp(reference[i]) * (reference[i] - lp[i]);
  return sum;
}

bool same_top(const std::vector<double>& a, const std::vector<double>& b) {
  return std::max_element(a.begin(), a.end()) - a.begin() == std::max_element(b.begin(), b.end()) - b.begin();
}

Status logits_not_finite(const std::string& who) {
  return {StatusCode::non_finite,
          fmt::format("the logits of {} are not finite; the weights or the cache profile overflow", who)};
}

}  // namespace narrows
