#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace narrows::testing {

/// The same n numbers of a normal distribution each time.
inline std::vector<float> random_rows(int64_t n) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(random);
  return x;
}

}  // namespace narrows::testing
