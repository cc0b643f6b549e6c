// Oracle: half <-> float, x [n] -> y [n].
#include "kernels/half.h"
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {

void f32_to_f16(const float* x, f16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = float_to_half(x[i]);
}

void f16_to_f32(const f16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = half_to_float(x[i]);
}

}  // namespace narrows::kernels::ref
