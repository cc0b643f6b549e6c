#include "exec/executor.h"

#include <algorithm>

#include "kernels/ops.h"

namespace narrows {

void norm_row(const NormOp& norm, const float* x, int64_t n, float* y) {
  if (norm.weight == nullptr) {
    std::copy_n(x, n, y);
  } else {
    kernels::ops().rms_norm(x, norm.weight, n, norm.eps, y);
  }
}

void norm_heads(const HeadNorms& norms, int64_t first, int64_t end, float* x) {
  if (norms.norm.weight == nullptr) return;
  for (int64_t i = first; i < end; ++i)
    norm_row(norms.norm, x + i * norms.width, norms.width, x + i * norms.width);
}

}  // namespace narrows
