// Stage 2 of a sparse step: which tokens in pages are read. Sinks and the recent window are outside the pages
// and always read. scores [n] in; ascending indices [count] out.
#include <algorithm>
#include <numeric>

#include "kv/step/stages.h"

namespace narrows {

int64_t count_selected(const KvProfile& profile, int64_t n_in_pages, int64_t n_kv) {
  if (profile.budget == KvProfile::kBudgetAll) return n_in_pages;
  return std::clamp<int64_t>(profile.budget_at(n_kv), 0, n_in_pages);
}

void select_tokens(const float* scores, int64_t n, int64_t count, int32_t* selected, void* work) {
  if (count == n) {
    std::iota(selected, selected + n, 0);
  } else {
    kernels::ops().select_top(scores, n, count, selected, work);
  }
}

}  // namespace narrows
