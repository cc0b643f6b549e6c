// Oracle of the latent page kernels: one coordinate, one token at a time.
#include "kernels/latent_page.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {

namespace {

/// Largest s with amplitude(s) <= x, as if the table had no ends; x > 0, normal.
int floor_scale(float x) {
  int exponent = 0;
  const float mantissa = 2 * std::frexp(x, &exponent);  // [1, 2)
  int eighth = 0;
  while (eighth < 7 && kAmplitude[static_cast<size_t>(kScaleBias + eighth + 1)] <= mantissa) ++eighth;
  return (exponent - 1) * 8 + eighth + kScaleBias;
}

int code_of(float z, float step, int bits) {
  const int levels = 1 << bits;
  const float code = std::floor(z / step) + static_cast<float>(levels / 2);
  return static_cast<int>(std::clamp(code, 0.0F, static_cast<float>(levels - 1)));
}

float step_of(int scale, int bits) {
  return kAmplitude[static_cast<size_t>(scale)] * std::ldexp(1.0F, 2 - bits);
}

}  // namespace

bool quant_latents(const float* z, int64_t ldz, int64_t n_coord, const uint8_t* octet_bits, uint8_t* scales,
                   uint8_t* codes, int64_t ldc) {
  for (int64_t c = 0; c < n_coord; ++c) {
    const int bits = octet_bits[c / kOctet];
    float top = 0;
    for (int64_t t = 0; t < kTile; ++t) {
      if (!std::isfinite(z[t * ldz + c])) return false;
      top = std::max(top, std::fabs(z[t * ldz + c]));
    }
    const int first = top < kAmplitude[0] ? 0 : floor_scale(top) - 8;
    if (first + kScaleSteps[0] > 255) return false;
    double least = std::numeric_limits<double>::infinity();
    for (const int offset : kScaleSteps) {
      const int s = std::max(0, first + offset);
      double error = 0;
      for (int64_t t = 0; t < kTile; ++t) {
        const float step = step_of(s, bits);
        const double value =
            (code_of(z[t * ldz + c], step, bits) - (1 << bits) / 2 + 0.5) * static_cast<double>(step);
        const double off = static_cast<double>(z[t * ldz + c]) - value;
        error += off * off;
      }
      if (error < least) {
        least = error;
        scales[c] = static_cast<uint8_t>(s);
      }
    }
    for (int64_t t = 0; t < kTile; ++t)
      codes[t * ldc + c] = static_cast<uint8_t>(code_of(z[t * ldz + c], step_of(scales[c], bits), bits));
  }
  return true;
}

void unpack_planes(const uint8_t* row, const PlaneRow& shape, const float* amplitude, float* z) {
  for (int64_t c = 0; c < shape.n_octet * kOctet; ++c) {
    const int64_t octet = c / kOctet;
    double value = 0;
    for (size_t j = 0; j < static_cast<size_t>(shape.n_plane) && octet < shape.octets[j]; ++j) {
      const bool set = (row[shape.offset[j] + octet] >> (c % kOctet) & 1) != 0;
      value += std::ldexp(set ? 1.0 : -1.0, -static_cast<int>(j));
    }
    z[c] = static_cast<float>(value * static_cast<double>(amplitude[c]));
  }
}

void expand_index(const uint8_t* planes, const uint8_t* octet_bits, int64_t n_octet, int max_bits,
                  uint8_t* codes) {
  for (int64_t c = 0; c < n_octet * kOctet; ++c) {
    const int bits = octet_bits[c / kOctet];
    for (int64_t t = 0; t < kTile; ++t) {
      const int64_t slot = index_slot(t);
      int code = 0;
      for (int j = 0; j < std::min(bits, max_bits); ++j)
        code = 2 * code + (planes[j * kTile / 8 + slot / 8] >> (slot % 8) & 1);
      codes[c / 4 * 4 * kTile + t * 4 + c % 4] = static_cast<uint8_t>(code);
    }
    planes += bits * kTile / 8;
  }
}

void score_index(const uint8_t* codes, int64_t n_coord, const float* u, int64_t ldu, int64_t n_row,
                 const float* step, const float* centre, int64_t first, int64_t n, float* score,
                 int64_t lds) {
  for (int64_t r = 0; r < n_row; ++r) {
    const float* q = u + r * ldu;
    float top = 0;
    for (int64_t c = 0; c < n_coord; ++c) top = std::max(top, std::fabs(q[c] * step[c]));
    const double unit = static_cast<double>(top) / 127;
    for (int64_t t = first; t < first + n; ++t) {
      double sum = 0;
      for (int64_t c = 0; c < n_coord; ++c) {
        if (unit == 0) continue;
        const double weight = std::nearbyint(static_cast<double>(q[c] * step[c]) / unit);
        const double code = codes[c / 4 * 4 * kTile + t * 4 + c % 4];
        sum += weight * (code - static_cast<double>(centre[c]));
      }
      score[r * lds + t] = static_cast<float>(sum * unit + static_cast<double>(q[n_coord]));
    }
  }
}

void softmax_part(float* s, int64_t n, float* max, float* sum) {
  float top = s[0];
  for (int64_t i = 1; i < n; ++i) top = std::fmax(top, s[i]);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(s[i]) - static_cast<double>(top);
    const double e = x < -87.3 ? 0.0 : std::exp(x);
    s[i] = static_cast<float>(e);
    total += e;
  }
  *max = top;
  *sum = static_cast<float>(total);
}

void softmax_scores(float* s, int64_t n, float* max, float* sum) { softmax_part(s, n, max, sum); }

}  // namespace narrows::kernels::ref
