// Oracle: the products of packed weights and what lies between them, weight by weight in double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/pack_weights.h"
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {

void packed_product(const PackedMatrix& w, int64_t first, int64_t n_tile, const ByteRows& x, int64_t n_row,
                    float* y, int64_t ldy, bool accumulate) {
  const int64_t n_group = w.n_in / kPackGroup;
  std::vector<float> weight(static_cast<size_t>(w.n_in));
  const int64_t end = std::min(w.n_out, (first + n_tile) * kPackRows);
  for (int64_t o = first * kPackRows; o < end; ++o) {
    unpack_row(w, o, weight.data());
    for (int64_t r = 0; r < n_row; ++r) {
      double sum = accumulate ? y[r * ldy + o] : 0;
      for (int64_t k = 0; k < w.n_in; ++k) {
        const double input = double{x.scale[r * n_group + k / kPackGroup]} * x.code[r * w.n_in + k];
        sum += input * weight[static_cast<size_t>(k)];
      }
      y[r * ldy + o] = static_cast<float>(sum);
    }
  }
}

void unpack_tile(const PackedMatrix& w, int64_t tile, uint16_t* out, int64_t ld) {
  std::vector<float> row(static_cast<size_t>(w.n_in));
  for (int64_t r = 0; r < kPackRows; ++r) {
    unpack_row(w, tile * kPackRows + r, row.data());
    for (int64_t k = 0; k < w.n_in; ++k) out[k * ld + r] = float_to_bf16(row[static_cast<size_t>(k)]);
  }
}

void round_rows(const float* x, int64_t ldx, int64_t n_row, int64_t n_in, const ByteRows& out) {
  const int64_t n_group = n_in / kPackGroup;
  for (int64_t at = 0; at < n_row * n_group; ++at) {
    const float* from = x + at / n_group * ldx + at % n_group * kPackGroup;
    float top = 0;
    bool finite = true;
    for (int64_t i = 0; i < kPackGroup; ++i) {
      top = std::fmax(top, std::fabs(from[i]));
      finite = finite && std::isfinite(from[i]);
    }
    if (!finite) {
      put_no_number(out, at);
      continue;
    }
    const float scale = top / 127;
    const float inverse = scale >= 0x1p-126F ? 1 / scale : 0.0F;
    int32_t half[2] = {0, 0};
    for (int64_t i = 0; i < kPackGroup; ++i) {
      const auto code = static_cast<int32_t>(std::nearbyint(from[i] * inverse));
      out.code[at * kPackGroup + i] = static_cast<int8_t>(code);
      half[i / (kPackGroup / 2)] -= code;
    }
    out.scale[at] = scale;
    out.minus[at] = half[0] + half[1];
    out.minus_half[2 * at] = half[0];
    out.minus_half[2 * at + 1] = half[1];
    out.total[at] = -scale * static_cast<float>(half[0] + half[1]);
  }
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += double{x[i]} * x[i];
  const double scale = 1 / std::sqrt(square / static_cast<double>(n) + double{eps});
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(x[i] * scale * weight[i]);
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i)
    y[i] = static_cast<float>(gate[i] / (1 + std::exp(-double{gate[i]})) * up[i]);
}

void geglu(const float* gate, const float* up, int64_t n, float* y) {
  constexpr double kFactor = 1.5957691216057308;  // 2 sqrt(2 / pi)
  for (int64_t i = 0; i < n; ++i) {
    const double g = gate[i];
    y[i] = static_cast<float>(g / (1 + std::exp(-kFactor * (g + 0.044715 * g * g * g))) * up[i]);
  }
}

void swiglu_clamped(const float* gate, const float* up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    // A NaN stays one.
    const double g = gate[i] > 7 ? 7.0 : double{gate[i]};
    const double u = up[i] > 7 ? 7.0 : up[i] < -7 ? -7.0 : double{up[i]};
    y[i] = static_cast<float>(g / (1 + std::exp(-1.702 * g)) * (u + 1));
  }
}

}  // namespace narrows::kernels::ref
