// cos and sin of a position by the angle sum of two small tables. Frequencies follow the GGUF convention:
// base, frequency factors, linear scaling, YaRN (arXiv:2309.00071).
#include "kernels/rope_table.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace narrows::kernels {
namespace {

constexpr int64_t kFine = 256;  ///< positions in the fine table; both tables have about this length at 64K

/// The pair, as a real number, whose wave turns `turns` times over the original context:
/// freq_base^(2 i / n_rot) = n_ctx_orig / (2 pi turns).
double pair_of(double turns, const RopeParams& p) {
  return static_cast<double>(p.n_rot) *
         std::log(static_cast<double>(p.n_ctx_orig) / (turns * 2 * std::numbers::pi)) /
         (2 * std::log(p.freq_base));
}

/// YaRN's share of extrapolation (the unscaled angle) for pair i: 1 for waves that turn more than beta_fast
/// times over the original context, 0 for those that turn less than beta_slow times, linear between.
double extrapolation(int64_t i, const RopeParams& p) {
  const double low = std::max(0.0, std::floor(pair_of(p.beta_fast, p)));
  const double high = std::min(static_cast<double>(p.n_rot - 1), std::ceil(pair_of(p.beta_slow, p)));
  // The clamps to n_rot - 1 and 0.001 (low == high) are part of the convention.
  const double ramp = (static_cast<double>(i) - low) / std::max(0.001, high - low);
  return 1 - std::clamp(ramp, 0.0, 1.0);
}

}  // namespace

RopeTable::RopeTable(const RopeParams& params, int64_t n_ctx) : n_rot_(params.n_rot), n_ctx_(n_ctx) {
  const int64_t half = n_rot_ / 2;
  const bool yarn = params.ext_factor != 0;
  double magnitude = params.attn_factor;
  if (yarn) magnitude *= 1 + 0.1 * std::log(1 / params.freq_scale);
  magnitude_ = static_cast<float>(magnitude);

  frequency_.resize(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    const size_t at = static_cast<size_t>(i);
    const double factor = params.freq_factors.empty() ? 1.0 : double{params.freq_factors[at]};
    const double plain =
        std::pow(params.freq_base, -2.0 * static_cast<double>(i) / static_cast<double>(n_rot_)) / factor;
    const double interpolated = params.freq_scale * plain;
    const double mix = yarn ? params.ext_factor * extrapolation(i, params) : 0.0;
    frequency_[at] = interpolated * (1 - mix) + plain * mix;
  }

  const auto fill = [&](int64_t n, int64_t step, double factor, std::vector<float>& table) {
    table.resize(static_cast<size_t>(n * half * 2));
    float* to = table.data();
    for (int64_t a = 0; a < n; ++a) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(a * step) * frequency_[static_cast<size_t>(i)];
        *to++ = static_cast<float>(factor * std::cos(angle));
        *to++ = static_cast<float>(factor * std::sin(angle));
      }
    }
  };
  fill(n_ctx / kFine + 1, kFine, magnitude, coarse_);
  fill(kFine, 1, 1.0, fine_);
}

void RopeTable::at(int64_t pos, float* cos, float* sin, int64_t ld) const {
  const int64_t half = n_rot_ / 2;
  const float* a = coarse_.data() + pos / kFine * half * 2;
  const float* b = fine_.data() + pos % kFine * half * 2;
  for (int64_t i = 0; i < half; ++i) {
    const float cos_a = a[2 * i];
    const float sin_a = a[2 * i + 1];
    const float cos_b = b[2 * i];
    const float sin_b = b[2 * i + 1];
    cos[i * ld] = cos_a * cos_b - sin_a * sin_b;
    sin[i * ld] = sin_a * cos_b + cos_a * sin_b;
  }
}

}  // namespace narrows::kernels
