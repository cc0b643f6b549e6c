#include "device/host_encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/half.h"
#include "kernels/ref/ref.h"

namespace narrows::testing {

using namespace device;

namespace {

constexpr int64_t kPage = NARROWS_CUDA_PAGE;
constexpr int64_t kStride = 16;  // of sampled queries

double element(const MomentsArgs& a, int64_t at) {
  return a.x_is_bf16 != 0 ? double{kernels::bf16_to_float(static_cast<const uint16_t*>(a.x)[at])}
                          : double{static_cast<const float*>(a.x)[at]};
}

double half(const void* p, int64_t i) {
  return double{kernels::half_to_float(static_cast<const uint16_t*>(p)[i])};
}

/// x [hd], rotated by pairs [hd / 2][2].
template <class Fn>
std::vector<double> rotated(Fn&& x, int64_t hd, const float* rope) {
  std::vector<double> y(static_cast<size_t>(hd));
  for (int64_t i = 0; i < hd / 2; ++i) {
    const double c = double{rope[2 * i]}, s = double{rope[2 * i + 1]};
    y[static_cast<size_t>(i)] = x(i) * c - x(i + hd / 2) * s;
    y[static_cast<size_t>(i + hd / 2)] = x(i + hd / 2) * c + x(i) * s;
  }
  return y;
}

/// Bits of a token's codes, into the row of its planes.
void put_planes(const uint8_t* codes, const uint8_t* bits, int64_t n_octet, const narrows_cuda_planes& planes,
                int64_t token, uint8_t* page) {
  for (int64_t o = 0; o < n_octet; ++o) {
    for (int j = 0; j < bits[o]; ++j) {
      uint8_t& byte = page[planes.at + token * planes.stride + planes.offset[j] + o];
      byte = 0;
      for (int64_t i = 0; i < 8; ++i)
        byte = static_cast<uint8_t>(byte | (codes[8 * o + i] >> (bits[o] - 1 - j) & 1) << i);
    }
  }
}

}  // namespace

int host_moments(const MomentsArgs& a) {
  const int64_t w = a.width;
  std::vector<double> v(static_cast<size_t>(w));
  for (int64_t m = 0; m < a.n_matrix; ++m) {
    for (int64_t c = 0; a.makes_centre != 0 && c < w; ++c) {
      double sum = 0;
      for (int64_t r = 0; r < a.n; ++r) sum += element(a, r * a.ld + m * a.stride + c);
      a.centre[m * w + c] = static_cast<float>(sum / static_cast<double>(a.n));
    }
    double* sum = a.sum + m * w;
    double* moments = a.moments + m * w * w;
    if (a.accumulate == 0) {
      std::fill_n(sum, w, 0.0);
      std::fill_n(moments, w * w, 0.0);
    }
    for (int64_t i = 0; i < a.n * a.n_sub; ++i) {
      for (int64_t c = 0; c < w; ++c) {
        const double centre = a.centre != nullptr ? double{a.centre[m * w + c]} : 0.0;
        v[static_cast<size_t>(c)] =
            element(a, i / a.n_sub * a.ld + m * a.stride + i % a.n_sub * w + c) - centre;
        sum[c] += v[static_cast<size_t>(c)];
      }
      for (int64_t c = 0; c < w; ++c) {
        for (int64_t e = 0; e < w; ++e)
          moments[c * w + e] += v[static_cast<size_t>(c)] * v[static_cast<size_t>(e)];
      }
    }
  }
  return 0;
}

int host_sample(const SampleArgs& a) {
  for (int64_t r = 0; r < a.n; ++r) {
    for (int64_t i = 0; i < a.width; ++i)
      static_cast<uint16_t*>(a.to)[r * a.width + i] =
          kernels::float_to_half(a.x[(a.first + r * a.step) * a.ld + i]);
  }
  return 0;
}

int host_klt_shares(const KltSharesArgs& a) {
  const int64_t hd = a.head_dim, group = a.n_head / a.n_head_kv;
  if (a.n_sink > 128 || group > 8 || a.n_after >= kPage || (hd != 64 && hd != 128)) return -1;
  std::fill_n(a.share, int64_t{a.n_page} * a.n_head_kv * kPage, 0.0F);
  for (int64_t p = 0; p < a.n_page; ++p) {
    const int64_t token = p * kPage, n_after = std::min<int64_t>(a.n_after, a.n_token - token - kPage);
    for (int64_t h = 0; h < a.n_head; ++h) {
      const int64_t kv = h / group;
      for (int64_t i = 0; i < n_after; i += kStride) {
        const int64_t at = token + kPage + i;
        const int64_t from = (at / kStride * a.n_head + h) * hd;
        const auto q = rotated([&](int64_t c) { return half(a.samples, from + c); }, hd,
                               a.rope + (a.position + at) * hd);
        std::vector<double> score;
        for (int64_t t = 0; t < a.n_sink + kPage + i + 1; ++t) {
          const int64_t row = token + t - a.n_sink;
          std::vector<double> key(static_cast<size_t>(hd));
          for (int64_t c = 0; t < a.n_sink && c < hd; ++c)
            key[static_cast<size_t>(c)] = double{a.sinks[t * a.ld + kv * hd + c]};
          if (t >= a.n_sink)
            key = rotated([&](int64_t c) { return double{a.keys[row * a.ld + kv * hd + c]}; }, hd,
                          a.rope + (a.position + row) * hd);
          double dot = 0;
          for (size_t c = 0; c < key.size(); ++c) dot += key[c] * q[c];
          score.push_back(dot * double{a.scale});
        }
        const double top = *std::max_element(score.begin(), score.end());
        double sum = 0;
        for (double& s : score) sum += s = std::exp(s - top);
        for (int64_t t = 0; t < kPage; ++t)
          a.share[(p * a.n_head_kv + kv) * kPage + t] +=
              static_cast<float>(score[static_cast<size_t>(a.n_sink + t)] / sum);
      }
    }
  }
  return 0;
}

int host_klt_encode(const KltEncodeArgs& a) {
  const int64_t w = a.width;
  if (w < 8 || w > 256 || w % 8 != 0) return -1;
  std::vector<float> z(static_cast<size_t>(kPage * w));
  std::vector<uint8_t> codes(z.size()), scales(static_cast<size_t>(w));
  for (int64_t p = 0; p < a.n_page; ++p) {
    auto* page = static_cast<uint8_t*>(a.pool) + a.table[p] * a.page_bytes;
    std::memset(page, 0, static_cast<size_t>(a.page_bytes));
    std::memcpy(page, a.anchors + p, sizeof(uint64_t));
    for (int64_t part = 0; part < a.n_part; ++part) {
      const narrows_cuda_klt_part& to = a.parts[part];
      for (const bool is_key : {true, false}) {
        const int64_t matrix = 2 * part + (is_key ? 0 : 1);
        const float* x = (is_key ? a.k : a.v) + p * kPage * a.ld + part * w;
        const float* mean = is_key ? to.key_mean : to.value_mean;
        const uint8_t* bits = a.bits + matrix * 32;
        int64_t n = 0;
        while (n < w / 8 && bits[n] > 0) ++n;
        for (int64_t t = 0; t < kPage; ++t) {
          for (int64_t c = 0; c < 8 * n; ++c) {
            double sum = 0;
            for (int64_t i = 0; i < w && (a.anchors[p] >> t & 1) == 0; ++i)
              sum += double{x[t * a.ld + i] - mean[i]} * double{a.project[(matrix * w + i) * w + c]};
            z[static_cast<size_t>(t * w + c)] = static_cast<float>(sum);
          }
        }
        if (!kernels::ref::quant_latents(z.data(), w, 8 * n, bits, scales.data(), codes.data(), w)) {
          a.bad[p] = 1;
          continue;
        }
        std::copy_n(scales.data(), 8 * n, page + (is_key ? to.key_scale_at : to.value_scale_at));
        const int64_t n_index = is_key ? std::min<int64_t>(to.n_index / 8, n) : 0;
        for (int64_t t = 0; t < kPage; ++t) {
          const uint8_t* row = codes.data() + t * w;
          put_planes(row, bits, n_index, to.index, t, page);
          put_planes(row + 8 * n_index, bits + n_index, n - n_index, is_key ? to.rest : to.value, t, page);
        }
      }
    }
  }
  return 0;
}

}  // namespace narrows::testing
