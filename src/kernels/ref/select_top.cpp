// Oracle: indices of the `count` largest scores, ties to the lower index, in ascending order of index; by
// sorting.
#include <algorithm>
#include <bit>

#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {
namespace {

/// Unsigned integers in the order of the floats; -0 and +0 are equal. A total order, so that sorting is
/// defined even if a score is NaN (a bug elsewhere must not become a crash here).
uint32_t order_key(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

}  // namespace

void select_top(const float* score, int64_t n, int64_t count, int32_t* index, void* scratch) {
  int32_t* all = static_cast<int32_t*>(scratch);
  for (int64_t i = 0; i < n; ++i) all[i] = static_cast<int32_t>(i);
  std::sort(all, all + n, [score](int32_t a, int32_t b) {
    const uint32_t key_a = order_key(score[a]);
    const uint32_t key_b = order_key(score[b]);
    return key_a != key_b ? key_a > key_b : a < b;
  });
  std::sort(all, all + count);
  std::copy(all, all + count, index);
}

}  // namespace narrows::kernels::ref
