// Oracle: attention of one tile into an online-softmax state, in double.
// A key with score -infinity weighs nothing; a row that has seen only such keys stays empty.
#include <cmath>
#include <limits>

#include "kernels/half.h"
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double value(float x) { return x; }
double value(f16_t x) { return half_to_float(x); }

template <class T>
void attend(const float* q, int64_t n_row, int64_t head_dim, const T* k_t, int64_t ldk, const T* v,
            int64_t ldv, int64_t n, const SoftmaxRows& state) {
  float score[kTile];
  double weight[kTile];
  for (int64_t r = 0; r < n_row; ++r) {
    double top = state.max[r];
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t d = 0; d < head_dim; ++d) sum += double{q[r * head_dim + d]} * value(k_t[d * ldk + j]);
      // The maximum is kept as float, so the scores are too: the largest then weighs exactly 1.
      score[j] = static_cast<float>(sum);
      if (!(score[j] <= top)) top = score[j];
    }
    if (n == 0 || top == -kInfinity) continue;
    const double keep =
        state.max[r] == -std::numeric_limits<float>::infinity() ? 0 : std::exp(state.max[r] - top);
    double sum = keep * state.sum[r];
    for (int64_t j = 0; j < n; ++j) {
      weight[j] = std::exp(score[j] - top);
      sum += weight[j];
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      double out = keep * state.out[r * head_dim + d];
      for (int64_t j = 0; j < n; ++j) out += weight[j] * value(v[j * ldv + d]);
      state.out[r * head_dim + d] = static_cast<float>(out);
    }
    state.max[r] = static_cast<float>(top);
    state.sum[r] = static_cast<float>(sum);
  }
}

}  // namespace

void attend_f32(const float* q, int64_t n_row, int64_t head_dim, const float* k_t, int64_t ldk,
                const float* v, int64_t ldv, int64_t n, const SoftmaxRows& state) {
  attend(q, n_row, head_dim, k_t, ldk, v, ldv, n, state);
}

void attend_f16(const float* q, int64_t n_row, int64_t head_dim, const f16_t* k_t, int64_t ldk,
                const f16_t* v, int64_t ldv, int64_t n, const SoftmaxRows& state) {
  attend(q, n_row, head_dim, k_t, ldk, v, ldv, n, state);
}

}  // namespace narrows::kernels::ref
