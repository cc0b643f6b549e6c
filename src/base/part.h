// How threads share things in order.
#pragma once

#include <cstdint>

namespace narrows {

/// Part [begin, end) of n things that thread ith of n_threads works on: contiguous, all parts equal up to
/// one.
struct Part {
  int64_t begin = 0;
  int64_t end = 0;
};
inline Part part_of(int64_t n, int ith, int n_threads) {
  return {n * ith / n_threads, n * (ith + 1) / n_threads};
}

}  // namespace narrows
