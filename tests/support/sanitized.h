// What tests do less of under AddressSanitizer and ThreadSanitizer, which make code five to twenty times
// slower: the presets that use them look for faults of memory and threads, and most values of a list touch
// the same lines of code. The numbers themselves are checked for every value by the release build.
#pragma once

#include <cstddef>
#include <vector>

namespace narrows {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

/// All values; with a sanitizer the first, every third after it and the last.
template <typename T>
std::vector<T> thinned(std::vector<T> values) {
  if (!kSanitized) return values;
  std::vector<T> some;
  for (size_t i = 0; i < values.size(); ++i) {
    if (i % 3 == 0 || i + 1 == values.size()) some.push_back(values[i]);
  }
  return some;
}

}  // namespace narrows
