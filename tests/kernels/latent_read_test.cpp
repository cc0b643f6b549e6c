// The kernels of a sparse step over latent pages on every target, against sums in double over every odd size.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/kernel_test.h"
#include "kernels/latent_page.h"

namespace narrows::kernels {
namespace {

class LatentRead : public EachTarget {};

// Turning a query by any angle and projecting it is the sum of the folded rows times cosines and sines.
TEST_P(LatentRead, FoldedQueriesTurnByAnyAngle) {
  Random random(1);
  for (const int64_t half : {0, 1, 3, 8}) {
    for (int64_t n = 1; n <= 70; n += n < 20 ? 1 : 7) {
      const int64_t ldb = n + 3, ldo = n + 5;
      Array<float> q(2 * half), basis(2 * half * ldb), out(2 * half * ldo);
      fill_normal(q, 1, 2 * half, 2 * half, random);
      fill_normal(basis, 2 * half, n, ldb, random);
      ops().fold_query(q.data(), half, basis.data(), ldb, n, out.data(), ldo);
      std::vector<double> angle;
      for (int64_t i = 0; i < half; ++i) angle.push_back(0.3 + 1.7 * static_cast<double>(i));
      for (int64_t c = 0; c < n; ++c) {
        double want = 0, got = 0, size = 0;
        for (int64_t i = 0; i < half; ++i) {
          const double x = q[i], y = q[half + i], cos = std::cos(angle[static_cast<size_t>(i)]),
                       sin = std::sin(angle[static_cast<size_t>(i)]);
          const double a = basis[i * ldb + c], b = basis[(half + i) * ldb + c];
          want += a * (x * cos + y * sin) + b * (y * cos - x * sin);
          got += cos * static_cast<double>(out[2 * i * ldo + c]) +
                 sin * static_cast<double>(out[(2 * i + 1) * ldo + c]);
          size += std::fabs(a * x) + std::fabs(b * y) + std::fabs(a * y) + std::fabs(b * x);
        }
        ASSERT_NEAR(got, want, gamma(3) * size) << half << " pairs, column " << c << " of " << n;
      }
      for (int64_t i = 0; i < 2 * half; ++i)
        ASSERT_TRUE(std::isnan(out[i * ldo + n])) << "written beyond the columns";
    }
  }
}

TEST_P(LatentRead, CandidatesAreThoseAboveTheFloor) {
  Random random(2);
  std::uniform_real_distribution<float> uniform(0, 1);
  for (const int64_t n_row : {1, 2, 7}) {
    for (int64_t n = 0; n <= 70; ++n) {
      const int64_t ldp = n + 9;
      Array<float> p(n_row * ldp), weight(n_row), value(n);
      Array<int32_t> index(n);
      for (int64_t r = 0; r < n_row; ++r) {
        weight[r] = uniform(random);
        for (int64_t t = 0; t < n; ++t) p[r * ldp + t] = uniform(random) < 0.5F ? 0.0F : uniform(random);
      }
      if (n > 5) p[5] = kNaN;
      for (const float floor : {0.0F, 0.1F, 0.5F, 3e38F}) {
        const int64_t count = ops().pool_candidates(p.data(), ldp, n_row, weight.data(), n, floor, 1000,
                                                    index.data(), value.data());
        ASSERT_LE(count, n);
        int64_t at = 0;
        for (int64_t t = 0; t < n; ++t) {
          double pooled = 0;
          for (int64_t r = 0; r < n_row; ++r)
            pooled += static_cast<double>(weight[r]) * static_cast<double>(p[r * ldp + t]);
          const double slack = gamma(static_cast<double>(n_row) + 1) * pooled;
          const bool listed = at < count && index[at] == 1000 + t;
          if (listed) {
            ASSERT_NEAR(value[at], pooled, slack) << t;
            ASSERT_GE(value[at], floor);
            ++at;
          } else {
            // A pooled value that rounds to the floor may be on either side of it.
            ASSERT_FALSE(pooled > static_cast<double>(floor) + slack) << t << " is missing of " << n;
          }
        }
        ASSERT_EQ(at, count) << "tokens that do not exist, or out of order";
        if (n > 5 && floor == 0) {
          ASSERT_EQ(count, n - 1) << "all but the NaN";
        }
      }
    }
  }
}

TEST_P(LatentRead, CountsAndKeepsWhatIsAbove) {
  Random random(6);
  for (int64_t n = 0; n <= 100; ++n) {
    Array<float> value(n);
    Array<int32_t> index(n), selected(n);
    for (int64_t i = 0; i < n; ++i) {
      value[i] = static_cast<float>(random() % 8) / 8;  // many are equal
      index[i] = static_cast<int32_t>(3 * i + 1);
    }
    if (n > 20) value[20] = kNaN;
    for (const float floor : {0.0F, 0.125F, 0.5F, 0.875F, 2.0F}) {
      int64_t count = -1;
      double sum = -1;
      ops().count_above(value.data(), n, floor, &count, &sum);
      int64_t want_count = 0;
      double want_sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (!(value[i] >= floor)) continue;
        ++want_count;
        want_sum += static_cast<double>(value[i]);
      }
      ASSERT_EQ(count, want_count) << n;
      ASSERT_EQ(sum, want_sum) << n;  // eighths add up exactly
      for (const int64_t n_equal : {int64_t{0}, int64_t{1}, int64_t{5}, n}) {
        std::vector<int32_t> want;
        int64_t due = n_equal;
        for (int64_t i = 0; i < n; ++i) {
          if (value[i] > floor || (value[i] == floor && due-- > 0)) want.push_back(index[i]);
        }
        const int64_t m = ops().keep_above(index.data(), value.data(), n, floor, n_equal, selected.data());
        ASSERT_EQ(std::vector<int32_t>(selected.data(), selected.data() + m), want) << n << " " << floor;
        Array<int32_t> in_place(n);
        std::copy_n(index.data(), n, in_place.data());
        const int64_t k = ops().keep_above(in_place.data(), value.data(), n, floor, n_equal, in_place.data());
        ASSERT_EQ(std::vector<int32_t>(in_place.data(), in_place.data() + k), want) << n << " in place";
      }
    }
  }
}

TEST_P(LatentRead, AmplitudesOfAllScales) {
  Array<uint8_t> scales(256);
  for (int64_t s = 0; s < 256; ++s) scales[s] = static_cast<uint8_t>(s);
  for (int64_t first = 0; first < 256; first += 37) {
    for (const int64_t n : {int64_t{0}, int64_t{1}, int64_t{15}, int64_t{17}, int64_t{31}, 256 - first}) {
      if (first + n > 256) continue;
      Array<float> amplitude(n);
      ops().amplitudes(scales.data() + first, n, amplitude.data());
      for (int64_t i = 0; i < n; ++i)
        ASSERT_EQ(amplitude[i], kAmplitude[static_cast<size_t>(first + i)]) << first + i;
    }
  }
}

TEST_P(LatentRead, IndexOfOneToken) {
  Random random(3);
  for (const int64_t n_coord : {0, 8, 16, 24, 32, 56}) {
    Array<uint8_t> codes(n_coord * kTile);
    Array<float> step(n_coord), centre(n_coord), amplitude(n_coord), z(n_coord);
    for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(random());
    for (int64_t c = 0; c < n_coord; ++c) {
      step[c] = std::ldexp(1.0F, -static_cast<int>(random() % 7));
      centre[c] = std::ldexp(1.0F, static_cast<int>(random() % 8)) - 0.5F;
      amplitude[c] = kAmplitude[random() % 256];
    }
    for (int64_t token = 0; token < kTile; ++token) {
      ops().read_index(codes.data(), token, n_coord, step.data(), centre.data(), amplitude.data(), z.data());
      for (int64_t c = 0; c < n_coord; ++c) {
        const double want = (static_cast<double>(codes[c / 4 * 4 * kTile + token * 4 + c % 4]) -
                             static_cast<double>(centre[c])) *
                            static_cast<double>(step[c]) * static_cast<double>(amplitude[c]);
        ASSERT_NEAR(z[c], want, gamma(3) * std::fabs(want)) << c << " of " << n_coord << " token " << token;
      }
    }
  }
}

TEST_P(LatentRead, SumsOfRowsOfPlanes) {
  Random random(4);
  std::normal_distribution<float> normal;
  for (const int64_t n_octet : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 19, 22, 24, 32}) {
    for (const int64_t n : {0, 1, 2, 5, 33}) {
      for (const int64_t n_row : {1, 2, 3, 4, 5, 6, 7, 8, 9, 17}) {
        std::vector<uint8_t> bits(static_cast<size_t>(n_octet));
        const auto most = 1 + random() % 8;  // rows of 8 planes take another way than those of fewer
        for (uint8_t& b : bits) b = static_cast<uint8_t>(1 + random() % most);
        std::sort(bits.rbegin(), bits.rend());
        const PlaneRow shape = make_plane_row(bits.data(), n_octet);
        const int64_t n_coord = n_octet * kOctet, padded = pad_latent(n_coord), ldw = n + 2, lds = padded + 3;
        std::vector<Array<uint8_t>> row;
        std::vector<Array<float>> amplitude;
        std::vector<const uint8_t*> rows;
        std::vector<const float*> amplitudes;
        for (int64_t i = 0; i < n; ++i) {
          row.emplace_back(shape.bytes);
          for (int64_t b = 0; b < shape.bytes; ++b) row.back()[b] = static_cast<uint8_t>(random());
          amplitude.emplace_back(padded);
          for (int64_t c = 0; c < n_coord; ++c) amplitude.back()[c] = kAmplitude[100 + random() % 60];
        }
        for (int64_t i = 0; i < n; ++i) {
          rows.push_back(row[static_cast<size_t>(i)].data());
          amplitudes.push_back(amplitude[static_cast<size_t>(i)].data());
        }
        Array<float> weight(n_row * ldw);
        fill_normal(weight, n_row, n, ldw, random);
        for (const bool accumulate : {false, true}) {
          Array<float> sum(n_row * lds);
          if (accumulate) fill_normal(sum, n_row, n_coord, lds, random);
          const std::vector<float> before(sum.data(), sum.data() + sum.size());
          ops().sum_planes(rows.data(), amplitudes.data(), n, shape, weight.data(), ldw, n_row, accumulate,
                           sum.data(), lds);
          for (int64_t r = 0; r < n_row; ++r) {
            for (int64_t c = 0; c < n_coord; ++c) {
              double want = accumulate ? static_cast<double>(before[static_cast<size_t>(r * lds + c)]) : 0.0;
              double size = std::fabs(want);
              for (int64_t i = 0; i < n; ++i) {
                double value = 0;
                for (int j = 0; j < bits[static_cast<size_t>(c / kOctet)]; ++j) {
                  const auto at = static_cast<size_t>(j);
                  const bool set =
                      (rows[static_cast<size_t>(i)][shape.offset[at] + c / kOctet] >> (c % kOctet) & 1) != 0;
                  value += std::ldexp(set ? 1.0 : -1.0, -j);
                }
                const double term = static_cast<double>(weight[r * ldw + i]) * value *
                                    static_cast<double>(amplitudes[static_cast<size_t>(i)][c]);
                want += term;
                size += std::fabs(term);
              }
              ASSERT_NEAR(sum[r * lds + c], want, gamma(static_cast<double>(n) + 12) * size)
                  << n_octet << " octets, " << n << " tokens, row " << r << " coordinate " << c;
            }
            ASSERT_TRUE(std::isnan(sum[r * lds + padded])) << "written beyond the padding";
          }
        }
      }
    }
  }
}

TEST_P(LatentRead, ScoresRowsOfHalves) {
  Random random(5);
  for (const int64_t head_dim : {1, 7, 16, 20, 64, 128}) {
    const int64_t held = 9, gap = held * head_dim;
    Array<float> keys(gap);
    fill_normal(keys, held, head_dim, head_dim, random);
    const Array<f16_t> key = to_halves(keys);
    for (int64_t n_row = 1; n_row <= 10; ++n_row) {
      for (const int64_t n : {0, 1, 4, 9}) {
        const int64_t lds = n + 3;
        std::vector<int32_t> slot;
        for (int64_t i = 0; i < n; ++i) slot.push_back(static_cast<int32_t>(random() % held));
        Array<float> q(n_row * head_dim), score(n_row * lds);
        fill_normal(q, n_row, head_dim, head_dim, random);
        ops().score_rows_f16(key.data(), slot.data(), n, q.data(), n_row, head_dim, score.data(), lds);
        for (int64_t r = 0; r < n_row; ++r) {
          for (int64_t i = 0; i < n; ++i) {
            double want = 0, size = 0;
            for (int64_t c = 0; c < head_dim; ++c) {
              const double term = static_cast<double>(q[r * head_dim + c]) *
                                  as_double(key[slot[static_cast<size_t>(i)] * head_dim + c]);
              want += term;
              size += std::fabs(term);
            }
            ASSERT_NEAR(score[r * lds + i], want, gamma(static_cast<double>(head_dim) + 2) * size);
          }
          ASSERT_TRUE(std::isnan(score[r * lds + n]));
        }
      }
    }
  }
}

NARROWS_EACH_TARGET(LatentRead);

}  // namespace
}  // namespace narrows::kernels
