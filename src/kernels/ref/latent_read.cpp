// Oracle of the kernels of a sparse step over latent pages (../latent_read.cpp): one number at a time.
#include <cmath>

#include "kernels/half.h"
#include "kernels/latent_page.h"
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {

void fold_query(const float* q, int64_t half, const float* basis, int64_t ldb, int64_t n, float* out,
                int64_t ldo) {
  for (int64_t i = 0; i < half; ++i) {
    const double x = q[i], y = q[half + i];
    for (int64_t c = 0; c < n; ++c) {
      const double a = basis[i * ldb + c], b = basis[(half + i) * ldb + c];
      out[2 * i * ldo + c] = static_cast<float>(a * x + b * y);
      out[(2 * i + 1) * ldo + c] = static_cast<float>(a * y - b * x);
    }
  }
}

int64_t pool_candidates(const float* p, int64_t ldp, int64_t n_row, const float* weight, int64_t n,
                        float floor, int32_t first, int32_t* index, float* value) {
  int64_t count = 0;
  for (int64_t t = 0; t < n; ++t) {
    double pooled = 0;
    for (int64_t r = 0; r < n_row; ++r)
      pooled += static_cast<double>(weight[r]) * static_cast<double>(p[r * ldp + t]);
    const auto rounded = static_cast<float>(pooled);
    if (!(rounded >= floor)) continue;
    index[count] = first + static_cast<int32_t>(t);
    value[count++] = rounded;
  }
  return count;
}

void count_above(const float* value, int64_t n, float floor, int64_t* count, double* sum) {
  *count = 0;
  *sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(value[i] >= floor)) continue;
    ++*count;
    *sum += static_cast<double>(value[i]);
  }
}

int64_t keep_above(const int32_t* index, const float* value, int64_t n, float floor, int64_t n_equal,
                   int32_t* selected) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (value[i] > floor || (value[i] == floor && n_equal-- > 0)) selected[count++] = index[i];
  }
  return count;
}

void amplitudes(const uint8_t* scales, int64_t n, float* amplitude) {
  for (int64_t c = 0; c < n; ++c) amplitude[c] = kAmplitude[scales[c]];
}

void read_index(const uint8_t* codes, int64_t token, int64_t n_coord, const float* step, const float* centre,
                const float* amplitude, float* z) {
  for (int64_t c = 0; c < n_coord; ++c) {
    const double code = codes[c / 4 * 4 * kTile + token * 4 + c % 4];
    z[c] = static_cast<float>((code - static_cast<double>(centre[c])) * static_cast<double>(step[c]) *
                              static_cast<double>(amplitude[c]));
  }
}

void sum_planes(const uint8_t* const* rows, const float* const* amplitudes, int64_t n, const PlaneRow& shape,
                const float* weight, int64_t ldw, int64_t n_row, bool accumulate, float* sum, int64_t lds) {
  for (int64_t c = 0; c < shape.n_octet * kOctet; ++c) {
    const int64_t octet = c / kOctet;
    for (int64_t r = 0; r < n_row; ++r) {
      double total = accumulate ? static_cast<double>(sum[r * lds + c]) : 0.0;
      for (int64_t i = 0; i < n; ++i) {
        double value = 0;
        for (size_t j = 0; j < static_cast<size_t>(shape.n_plane) && octet < shape.octets[j]; ++j) {
          const bool set = (rows[i][shape.offset[j] + octet] >> (c % kOctet) & 1) != 0;
          value += std::ldexp(set ? 1.0 : -1.0, -static_cast<int>(j));
        }
        total += static_cast<double>(weight[r * ldw + i]) * value * static_cast<double>(amplitudes[i][c]);
      }
      sum[r * lds + c] = static_cast<float>(total);
    }
  }
}

void score_rows_f16(const f16_t* key, const int32_t* slot, int64_t n, const float* q, int64_t n_row,
                    int64_t head_dim, float* score, int64_t lds) {
  for (int64_t i = 0; i < n; ++i) {
    const f16_t* k = key + slot[i] * head_dim;
    for (int64_t r = 0; r < n_row; ++r) {
      double total = 0;
      for (int64_t c = 0; c < head_dim; ++c)
        total += static_cast<double>(q[r * head_dim + c]) * static_cast<double>(half_to_float(k[c]));
      score[r * lds + i] = static_cast<float>(total);
    }
  }
}

}  // namespace narrows::kernels::ref
