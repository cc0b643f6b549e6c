// Oracle: gated DeltaNet token by token, as its rule is written.
#include <cmath>
#include <vector>

#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

/// One token; s [head_dim, head_dim] in double.
void step(const float* q, const float* k, const float* v, double decay, double beta, int64_t head_dim,
          std::vector<double>& s, float* out) {
  for (double& x : s) x *= decay;
  for (int64_t c = 0; c < head_dim; ++c) {
    const auto at = [&](int64_t i) -> double& { return s[static_cast<size_t>(i * head_dim + c)]; };
    double known = 0;
    for (int64_t i = 0; i < head_dim; ++i) known += at(i) * static_cast<double>(k[i]);
    const double delta = beta * (static_cast<double>(v[c]) - known);
    double sum = 0;
    for (int64_t i = 0; i < head_dim; ++i) {
      at(i) += static_cast<double>(k[i]) * delta;
      sum += at(i) * static_cast<double>(q[i]);
    }
    out[c] = static_cast<float>(sum);
  }
}

std::vector<double> to_double(const float* s, int64_t n) { return {s, s + n}; }

void to_float(const std::vector<double>& from, float* s) {
  for (size_t i = 0; i < from.size(); ++i) s[i] = static_cast<float>(from[i]);
}

}  // namespace

void sigmoid_gate(const float* gate, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i)
    y[i] = static_cast<float>(static_cast<double>(y[i]) * sigmoid(static_cast<double>(gate[i])));
}

void conv_silu(const float* x, int64_t ldx, const float* before, int64_t ldb, const float* w, int64_t ldw,
               int64_t n_conv, int64_t n, int64_t n_channel, float* y, int64_t ldy) {
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < n_channel; ++c) {
      double sum = 0;
      for (int64_t j = 0; j < n_conv; ++j) {
        const int64_t row = r + 1 + j - n_conv;
        const float* from = row >= 0 ? x + row * ldx : before + (n_conv - 1 + row) * ldb;
        sum += static_cast<double>(w[j * ldw + c]) * static_cast<double>(from[c]);
      }
      y[r * ldy + c] = static_cast<float>(sum * sigmoid(sum));
    }
  }
}

void l2_norm(const float* x, int64_t n, float eps, float scale, float* y) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double factor = static_cast<double>(scale) / std::sqrt(square + static_cast<double>(eps));
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(static_cast<double>(x[i]) * factor);
}

void delta_step(const float* q, const float* k, const float* v, float decay, float beta, int64_t head_dim,
                float* s, float* out) {
  std::vector<double> state = to_double(s, head_dim * head_dim);
  step(q, k, v, static_cast<double>(decay), static_cast<double>(beta), head_dim, state, out);
  to_float(state, s);
}

void delta_rows(const float* kq, const float* v, const float* log_decay, const float* beta, int64_t n,
                int64_t head_dim, float* s, float* out, int64_t ldo, float* /*work*/) {
  std::vector<double> state = to_double(s, head_dim * head_dim);
  for (int64_t t = 0; t < n; ++t) {
    step(kq + (n + t) * head_dim, kq + t * head_dim, v + t * head_dim,
         std::exp(static_cast<double>(log_decay[t])), static_cast<double>(beta[t]), head_dim, state,
         out + t * ldo);
  }
  to_float(state, s);
}

}  // namespace narrows::kernels::ref
