// Oracle: rotation of head vectors by halves, pair (i, i + n_rot/2), for rows and for a transposed tile.
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {

void rope_rows(const float* x, int64_t n_row, int64_t head_dim, int64_t n_rot, const float* cos,
               const float* sin, int64_t ld_angle, bool inverse, float* y) {
  const int64_t half = n_rot / 2;
  for (int64_t r = 0; r < n_row; ++r) {
    const float* in = x + r * head_dim;
    float* out = y + r * head_dim;
    for (int64_t i = 0; i < half; ++i) {
      double c = cos[r * ld_angle + i];
      double s = sin[r * ld_angle + i];
      if (inverse) {  // forward is M R(t); its inverse R(-t) / M = (c, -s) / M^2, and M^2 = c^2 + s^2
        const double square = c * c + s * s;
        c /= square;
        s /= -square;
      }
      const double first = in[i];
      const double second = in[i + half];
      out[i] = static_cast<float>(first * c - second * s);
      out[i + half] = static_cast<float>(first * s + second * c);
    }
    for (int64_t i = n_rot; i < head_dim; ++i) out[i] = in[i];
  }
}

void rope_tile(float* x, int64_t ld, int64_t n, int64_t /*head_dim*/, int64_t n_rot, const float* cos,
               const float* sin, int64_t ld_angle) {
  const int64_t half = n_rot / 2;
  for (int64_t i = 0; i < half; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double c = cos[i * ld_angle + j];
      const double s = sin[i * ld_angle + j];
      const double first = x[i * ld + j];
      const double second = x[(i + half) * ld + j];
      x[i * ld + j] = static_cast<float>(first * c - second * s);
      x[(i + half) * ld + j] = static_cast<float>(first * s + second * c);
    }
  }
}

}  // namespace narrows::kernels::ref
