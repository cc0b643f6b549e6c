#include "exec/executor.h"

#include "kernels/ops.h"

namespace narrows {

void norm_heads(const NormOp& norm, int64_t n_head, int64_t head_dim, float* x) {
  if (norm.weight == nullptr) return;
  for (int64_t h = 0; h < n_head; ++h)
    kernels::ops().rms_norm(x + h * head_dim, norm.weight, head_dim, norm.eps, x + h * head_dim);
}

}  // namespace narrows
