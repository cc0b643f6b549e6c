// klt: bits, transforms, parts of a page and whole layers, against sums in double and the quantiser's own
// bounds.
#include <algorithm>
#include <cmath>

#include "kernels/half.h"
#include "kv/cache_data.h"

namespace narrows::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int64_t sum_of(const std::vector<uint8_t>& bits) {
  int64_t sum = 0;
  for (const uint8_t b : bits) sum += b;
  return sum;
}

bool falls(const std::vector<uint8_t>& bits) { return std::is_sorted(bits.rbegin(), bits.rend()); }

// --- bits

TEST(KltBits, AllAreGivenAway) {
  std::mt19937 random(1);
  std::exponential_distribution<float> positive;
  for (const int64_t width : {8, 20, 60, 64, 256}) {
    for (const double rate : {0.25, 1.0, 2.0, 2.5, 3.3, 7.9, 8.0}) {
      for (const float slope : {0.0F, 0.01F, 0.3F}) {
        std::vector<float> variance;
        for (int64_t c = 0; c < width; ++c)
          variance.push_back(positive(random) * std::exp(-slope * static_cast<float>(c)));
        std::sort(variance.rbegin(), variance.rend());
        const auto bits = allocate_octets(variance, rate);
        ASSERT_EQ(static_cast<int64_t>(bits.size()), ceil_div(width, 8));
        EXPECT_TRUE(falls(bits));
        EXPECT_LE(bits.front(), 8);
        EXPECT_EQ(sum_of(bits),
                  static_cast<int64_t>(std::floor(rate * static_cast<double>(width) / 8 + 1e-9)))
            << width << " " << rate;
      }
    }
  }
}

TEST(KltBits, EightOfEightIsEverything) {
  EXPECT_EQ(allocate_octets(std::vector<float>(32, 1.0F), 8), std::vector<uint8_t>(4, 8));
}

TEST(KltBits, ZeroVarianceIsHarmless) {
  EXPECT_EQ(sum_of(allocate_octets(std::vector<float>(32, 0.0F), 2)), 8);
  std::vector<float> one(32, 0.0F);
  std::fill_n(one.begin(), 8, 1.0F);
  // Nothing to gain elsewhere: the one octet takes all eight.
  EXPECT_EQ(allocate_octets(one, 2), (std::vector<uint8_t>{8, 0, 0, 0}));
}

TEST(KltBits, SixDecibelsABit) {
  EXPECT_EQ(allocate_octets(std::vector<float>(32, 1.0F), 3), std::vector<uint8_t>(4, 3));
  std::vector<float> two(16, 1.0F);
  std::fill_n(two.begin() + 8, 8, 1.0F / 16);  // four times smaller: two bits
  EXPECT_EQ(allocate_octets(two, 3), (std::vector<uint8_t>{4, 2}));
}

// --- moments

TEST(KltMoments, KeepTheSpreadBesideALargeMean) {
  constexpr int64_t kWidth = 12, kLd = 15, kN = 900;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(kN * kLd), kNan);  // between the rows: must not be read
  for (int64_t t = 0; t < kN; ++t) {
    const float common = normal(random);
    for (int64_t c = 0; c < kWidth; ++c)
      x[static_cast<size_t>(t * kLd + c)] =
          normal(random) + common + (c % 2 == 0 ? 70.0F : -70.0F);  // 50 deviations
  }
  CentredMoments moments(kWidth);
  for (int64_t t = 0, n = 1; t < kN; t += n, n = std::min<int64_t>(3 * n, kN - t))
    moments.add(x.data() + t * kLd, kLd, std::min(n, kN - t));
  ASSERT_EQ(moments.n_tokens(), kN);
  const auto at = [&](int64_t t, int64_t c) {
    return static_cast<double>(x[static_cast<size_t>(t * kLd + c)]);
  };
  std::vector<double> mean(kWidth);
  for (int64_t t = 0; t < kN; ++t) {
    for (int64_t c = 0; c < kWidth; ++c) mean[static_cast<size_t>(c)] += at(t, c) / kN;
  }
  const auto got_mean = moments.mean(), got = moments.covariance();
  for (int64_t i = 0; i < kWidth; ++i) {
    EXPECT_NEAR(got_mean[static_cast<size_t>(i)], mean[static_cast<size_t>(i)], 1e-5);
    for (int64_t j = 0; j < kWidth; ++j) {
      double want = 0;
      for (int64_t t = 0; t < kN; ++t)
        want += (at(t, i) - mean[static_cast<size_t>(i)]) * (at(t, j) - mean[static_cast<size_t>(j)]) / kN;
      EXPECT_NEAR(got[static_cast<size_t>(i * kWidth + j)], want, 1e-5) << i << " " << j;
    }
  }
}

// --- transforms

/// Rows with correlated channels of very different sizes, and a random weight for each block.
struct Sample {
  int64_t width, block, n;
  std::vector<float> x;
  std::vector<double> weight;
  CentredMoments moments;

  Sample(int64_t width_in, int64_t block_in, int64_t n_in, double unit = 1)
      : width(width_in), block(block_in), n(n_in), moments(width_in) {
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    for (int64_t t = 0; t < n; ++t) {
      const double common = normal(random);
      for (int64_t c = 0; c < width; ++c) {
        const double size = std::exp2(-4.0 * static_cast<double>(c % block) / static_cast<double>(block));
        x.push_back(
            static_cast<float>(unit * ((normal(random) + common) * size + static_cast<double>(c % 5))));
      }
    }
    weight.assign(static_cast<size_t>(width * block), 0);
    for (int64_t b = 0; b < width / block; ++b) {
      for (int64_t i = 0; i < block + 3; ++i) {
        std::vector<double> row(static_cast<size_t>(block));
        for (double& y : row) y = normal(random);
        for (int64_t r = 0; r < block; ++r) {
          for (int64_t c = 0; c < block; ++c)
            weight[static_cast<size_t>((b * block + r) * block + c)] +=
                row[static_cast<size_t>(r)] * row[static_cast<size_t>(c)];
        }
      }
    }
    moments.add(x.data(), width, n);
  }
};

/// y [width] = x W, block by block, in double.
template <class Weights, class Number>
std::vector<double> weigh(const Weights& weight, int64_t width, int64_t block, const std::vector<Number>& x) {
  std::vector<double> y(static_cast<size_t>(width));
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t i = 0; i < block; ++i) {
      y[static_cast<size_t>(c)] +=
          static_cast<double>(x[static_cast<size_t>(c / block * block + i)]) *
          static_cast<double>(weight[static_cast<size_t>((c / block * block + i) * block + c % block)]);
    }
  }
  return y;
}

std::vector<double> encode(const KltBasis& b, const float* x) {
  std::vector<double> centred(static_cast<size_t>(b.width)), z(centred.size());
  for (size_t c = 0; c < centred.size(); ++c)
    centred[c] = static_cast<double>(x[c]) - static_cast<double>(b.mean[c]);
  const auto y = weigh(b.weight, b.width, b.block, centred);
  for (size_t c = 0; c < z.size(); ++c) {
    for (size_t i = 0; i < z.size(); ++i) z[c] += y[i] * static_cast<double>(b.decode[c * z.size() + i]);
  }
  return z;
}

class KltTransforms : public testing::TestWithParam<double> {};  // the unit of the numbers

TEST_P(KltTransforms, InvertsDecorrelatesAndCarriesTheWeight) {
  const double unit = GetParam();
  const Sample s(24, 8, 1500, unit);
  const auto made = make_klt_basis(s.moments, s.weight, s.block);
  ASSERT_TRUE(made.ok()) << made.status().message();
  const KltBasis& b = *made;
  const auto width = static_cast<size_t>(s.width);
  std::vector<double> covariance(width * width);
  for (int64_t t = 0; t < s.n; ++t) {
    const auto z = encode(b, s.x.data() + t * s.width);
    for (size_t i = 0; i < width; ++i) {
      double back = static_cast<double>(b.mean[i]);
      for (size_t c = 0; c < width; ++c) {
        back += z[c] * static_cast<double>(b.decode[c * width + i]);
        covariance[i * width + c] += z[i] * z[c] / static_cast<double>(s.n);
      }
      ASSERT_NEAR(back, s.x[static_cast<size_t>(t * s.width) + i], 1e-4 * unit)
          << "token " << t << " channel " << i;
    }
  }
  EXPECT_NEAR(b.variance.front(), 1, 1e-6);
  EXPECT_TRUE(std::is_sorted(b.variance.rbegin(), b.variance.rend()));
  for (size_t i = 0; i < width; ++i) {
    for (size_t c = 0; c < width; ++c)
      EXPECT_NEAR(covariance[i * width + c], i == c ? b.variance[i] : 0.0F, 1e-4) << i << " " << c;
  }

  // An error e of z costs |e|^2, and so does the error e decode of x under W.
  std::mt19937 random(4);
  std::normal_distribution<double> normal;
  // W as given, in b's units: only directions below the floor differ, and these weights have none.
  const double scale = static_cast<double>(b.weight[0]) / s.weight[0];
  for (int round = 0; round < 10; ++round) {
    std::vector<double> e(width), x(width);
    double plain = 0;
    for (size_t c = 0; c < width; ++c) {
      e[c] = normal(random);
      plain += e[c] * e[c];
      for (size_t i = 0; i < width; ++i) x[i] += e[c] * static_cast<double>(b.decode[c * width + i]);
    }
    const auto y = weigh(s.weight, s.width, s.block, x);
    double weighted = 0;
    for (size_t i = 0; i < width; ++i) weighted += x[i] * y[i] * scale;
    EXPECT_NEAR(weighted / plain, 1, 1e-4);
  }
}
INSTANTIATE_TEST_SUITE_P(Units, KltTransforms, testing::Values(1.0, 1e-3, 100.0));

TEST(KltTransform, ConstantRowsHaveNoVariance) {
  CentredMoments moments(16);
  std::vector<float> x(16 * 50);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 16) - 3;
  moments.add(x.data(), 16, 50);
  for (const double w : {0.0, 1.0}) {
    std::vector<double> weight(16 * 8);
    for (size_t c = 0; c < 16; ++c) weight[c * 8 + c % 8] = w;
    const auto basis = make_klt_basis(moments, weight, 8);
    ASSERT_TRUE(basis.ok()) << basis.status().message();
    for (const float v : basis->variance) EXPECT_NEAR(v, 0, 1e-12);
    for (size_t c = 0; c < 16; ++c) EXPECT_NEAR(basis->mean[c], x[c], 1e-6);
    for (const float v : basis->decode) EXPECT_TRUE(std::isfinite(v));
    EXPECT_TRUE(make_klt_transform(*basis, 2).ok());
  }
}

TEST(KltTransform, RefusesWhatIsNotFinite) {
  const Sample s(16, 8, 40);
  auto weight = s.weight;
  weight[5] = std::numeric_limits<double>::infinity();
  EXPECT_EQ(make_klt_basis(s.moments, weight, 8).status().code(), StatusCode::non_finite);
  EXPECT_EQ(make_klt_basis(CentredMoments(16), s.weight, 8).status().code(),
            StatusCode::non_finite);  // no rows
  Sample broken(16, 8, 40);
  broken.x[3] = kNan;
  broken.moments.add(broken.x.data(), 16, 1);
  EXPECT_EQ(make_klt_basis(broken.moments, s.weight, 8).status().code(), StatusCode::non_finite);
  EXPECT_EQ(make_klt_basis(s.moments, s.weight, 5).status().code(), StatusCode::internal);
  EXPECT_EQ(make_klt_basis(s.moments, std::vector<double>(16), 8).status().code(), StatusCode::internal);
}

// Values of a layer may be small, and a head that is never used may have no spread at all beside one that
// has: neither may make a prompt fail.
TEST(KltTransform, HalfPrecisionHoldsAnyUnit) {
  for (const double unit : {1e-5, 1e-3, 1.0, 300.0}) {
    const Sample s(16, 8, 400, unit);
    const auto basis = make_klt_basis(s.moments, s.weight, 8);
    ASSERT_TRUE(basis.ok());
    const auto t = make_klt_transform(*basis, 4);
    ASSERT_TRUE(t.ok()) << unit << ": " << t.status().message();
  }
}

TEST(KltTransform, HoldsCoordinatesWithBits) {
  const Sample s(20, 20, 400);
  const auto basis = make_klt_basis(s.moments, s.weight, 20);
  ASSERT_TRUE(basis.ok());
  for (const double rate : {0.25, 0.5, 2.0, 8.0}) {
    const auto t = make_klt_transform(*basis, rate);
    ASSERT_TRUE(t.ok());
    EXPECT_EQ(t->n_coord % 8, 0);
    EXPECT_EQ(static_cast<int64_t>(t->decode.size()), t->n_coord * 20);
    EXPECT_EQ(static_cast<int64_t>(t->octet_bits.size()), kernels::pad_latent(t->n_coord) / 8);
    for (int64_t o = 0; o < t->n_coord / 8; ++o) EXPECT_GE(t->octet_bits[static_cast<size_t>(o)], 1);
    // Coordinates beyond the width exist only to fill an octet.
    for (int64_t i = 20 * 20; i < t->n_coord * 20; ++i) EXPECT_EQ(t->decode[static_cast<size_t>(i)], 0);
  }
}

TEST(KltDistances, IsTheMeanOfRotations) {
  for (const int64_t n_rot : {12, 8}) {
    const Heads s(1, 1, 12, n_rot);
    const int64_t d = 12;
    std::mt19937 random(6);
    std::normal_distribution<double> normal;
    std::vector<std::vector<double>> q(5, std::vector<double>(12));
    for (auto& row : q) {
      for (double& x : row) x = normal(random);
    }
    std::vector<double> c(144), want(144);
    for (const auto& row : q) {
      for (size_t i = 0; i < 144; ++i) c[i] += row[i / 12] * row[i % 12];
    }
    constexpr int kSteps = 256;  // the library's own choice of distances, log-uniform
    for (int k = 0; k < kSteps; ++k) {
      const double t = std::exp((k + 0.5) / kSteps * std::log(static_cast<double>(kContext)));
      for (const auto& row : q) {
        std::vector<double> turned = row;
        for (int64_t i = 0; i < n_rot / 2; ++i) {
          const double angle =
              t * std::pow(s.freq_base, -2.0 * static_cast<double>(i) / static_cast<double>(n_rot));
          const auto a = static_cast<size_t>(i), b = static_cast<size_t>(i + n_rot / 2);
          turned[a] = row[a] * std::cos(angle) - row[b] * std::sin(angle);
          turned[b] = row[a] * std::sin(angle) + row[b] * std::cos(angle);
        }
        for (size_t i = 0; i < 144; ++i) want[i] += turned[i / 12] * turned[i % 12] / kSteps;
      }
    }
    const auto got = DistanceAverage(s.rope, d).apply(c.data());
    for (size_t i = 0; i < 144; ++i)
      EXPECT_NEAR(got[i], want[i], 1e-5) << n_rot << ": " << i / 12 << ", " << i % 12;
  }
}

// --- parts

/// A part of s.width() channels made from tokens, and one page of them.
struct Page {
  KltPart part;
  std::vector<std::byte> bytes;

  static KltPart make(const Heads& s, const Tokens& tokens, double key_rate, double value_rate,
                      int64_t n_index) {
    const auto basis = klt_basis_of(s, tokens.k.data(), tokens.v.data(), tokens.n());
    auto key = make_klt_transform(basis.key.at(0), key_rate);
    auto value = make_klt_transform(basis.value.at(0), value_rate);
    EXPECT_TRUE(key.ok() && value.ok());
    return KltPart(0, *key, *value, n_index, 24);
  }
  Page(const Heads& s, const Tokens& tokens, double key_rate, double value_rate, int64_t n_index)
      : part(make(s, tokens, key_rate, value_rate, n_index)),
        bytes(static_cast<size_t>(part.layout().end()), std::byte{0xFF}) {
    EXPECT_TRUE(KltEncoder(part).encode(tokens.k.data(), tokens.v.data(), tokens.width, 0, bytes.data()));
  }
};

/// Whether what is stored of one transform is as close as its bits promise.
void expect_latents(const KltTransform& t, const float* x, const float* latent, int64_t ld) {
  std::vector<double> z(static_cast<size_t>(t.n_coord * kPageTokens));
  std::vector<double> size(z.size());
  const auto width = static_cast<size_t>(t.width);
  std::vector<double> weight;
  for (const auto w : t.weight)
    weight.push_back(static_cast<double>(kernels::half_to_float(w)) * static_cast<double>(t.weight_unit));
  for (int64_t i = 0; i < kPageTokens; ++i) {
    std::vector<double> centred(width);
    for (size_t c = 0; c < width; ++c)
      centred[c] =
          static_cast<double>(x[static_cast<size_t>(i) * width + c]) - static_cast<double>(t.mean[c]);
    const auto y = weigh(weight, t.width, t.block, centred);
    for (int64_t c = 0; c < t.n_coord; ++c) {
      for (size_t j = 0; j < width; ++j) {
        const double term =
            y[j] * static_cast<double>(kernels::half_to_float(t.decode[static_cast<size_t>(c) * width + j]));
        z[static_cast<size_t>(c * kPageTokens + i)] += term;
        size[static_cast<size_t>(c * kPageTokens + i)] += std::fabs(term);
      }
    }
  }
  for (int64_t c = 0; c < t.n_coord; ++c) {
    double top = 0, error = 0, rounding = 0;
    for (int64_t i = 0; i < kPageTokens; ++i) {
      const auto at = static_cast<size_t>(c * kPageTokens + i);
      top = std::max(top, std::fabs(z[at]));
      error += std::pow(static_cast<double>(latent[i * ld + c]) - z[at], 2);
      rounding = std::max(rounding, size[at] * 1e-5);  // of the products in float
    }
    // The first scale tried is at most an eighth of an octave above what holds the largest number.
    const double step =
        (top + rounding) / 2 * std::exp2(1 / 8.0) * std::exp2(2 - t.octet_bits[static_cast<size_t>(c / 8)]);
    EXPECT_LE(std::sqrt(error / kPageTokens), std::max(step / 2, 1.6e-5) + rounding) << "coordinate " << c;
  }
}

TEST(KltPage, StoresWhatItsBitsPromise) {
  for (const int64_t n_index : {0, 8, 16, 40, 1000}) {
    const Heads s(3, 3, 20);
    const Tokens tokens(s, 300);
    const Page page(s, tokens, 3, 2.5, n_index);
    const KltPart& part = page.part;
    EXPECT_LE(part.layout().n_index, part.layout().n_key);
    KltScratch scratch(s.width());
    std::vector<int32_t> slots;
    for (int32_t i = 0; i < kPageTokens; ++i) slots.push_back(i);
    part.read_rows(page.bytes.data(), slots.data(), kPageTokens, 0, scratch);
    expect_latents(part.key_transform(), tokens.k.data(), scratch.key.data(), scratch.ld);
    expect_latents(part.value(), tokens.v.data(), scratch.value.data(), scratch.ld);
    // Any choice of tokens, into any rows, is the same numbers.
    KltScratch some(s.width());
    const std::vector<int32_t> chosen = {0, 5, 17, 18, 40, 63};
    part.read_rows(page.bytes.data(), chosen.data(), 6, 11, some);
    for (size_t i = 0; i < chosen.size(); ++i) {
      const auto row = static_cast<int64_t>(11 + i) * some.ld, from = int64_t{chosen[i]} * scratch.ld;
      for (int64_t c = 0; c < part.layout().n_key; ++c)
        ASSERT_EQ(some.key[row + c], scratch.key[from + c]) << c;
      for (int64_t c = 0; c < part.layout().n_value; ++c)
        ASSERT_EQ(some.value[row + c], scratch.value[from + c]) << c;
    }
    // Keys of one head are channels of the whole row.
    std::vector<float> all(static_cast<size_t>(64 * 60)), head(static_cast<size_t>(64 * 20));
    part.rebuild_keys(scratch.key.data(), scratch.ld, 64, 0, 60, all.data(), 60);
    part.rebuild_keys(scratch.key.data(), scratch.ld, 64, 20, 20, head.data(), 20);
    for (size_t i = 0; i < 64 * 20; ++i) ASSERT_NEAR(head[i], all[i / 20 * 60 + 20 + i % 20], 1e-5);
    // A weighted sum of latents is the sum of values.
    std::vector<float> values(all.size()), sum(scratch.value.size(), 0.0F), got(20, 1.0F);
    part.rebuild_values(scratch.value.data(), scratch.ld, 64, values.data(), 60);
    for (int64_t t = 0; t < 64; ++t) {
      for (int64_t c = 0; c < part.layout().n_value; ++c)
        sum[static_cast<size_t>(c)] += scratch.value[t * scratch.ld + c] / 32;
    }
    part.rebuild_value(sum.data(), 2, 40, 20, got.data());
    for (size_t c = 0; c < 20; ++c) {
      double want = 1;
      for (size_t t = 0; t < 64; ++t) want += static_cast<double>(values[t * 60 + 40 + c]) / 32;
      EXPECT_NEAR(got[c], want, 1e-4) << c;
    }
  }
}

TEST(KltPage, RefusesWhatHasNoCode) {
  const Heads s(3, 3, 20);
  Tokens tokens(s, 300);
  Page page(s, tokens, 2, 3, 16);
  EXPECT_EQ(page.bytes[0], std::byte{0xFF}) << "the part begins at its offset";
  for (const bool in_key : {true, false}) {
    Tokens broken = tokens;
    (in_key ? broken.k : broken.v)[70] = kNan;
    EXPECT_FALSE(KltEncoder(page.part).encode(broken.k.data(), broken.v.data(), 60, 0, page.bytes.data()));
  }
}

TEST(KltPage, HeadsOfAPart) {
  EXPECT_EQ(heads_of_part(3, 64), 3);
  EXPECT_EQ(heads_of_part(4, 128), 2);
  EXPECT_EQ(heads_of_part(32, 128), 2);
  EXPECT_EQ(heads_of_part(5, 64), 1);  // 320 is too wide and 5 is prime
  EXPECT_EQ(heads_of_part(2, 512), 1);
}

// --- layers

KltLayer& klt_layer(KvCache& cache) { return static_cast<KltLayer&>(cache.layer(kCompressed)); }

double rms(const std::vector<float>& a, const std::vector<float>& b, size_t from = 0) {
  double sum = 0;
  for (size_t i = from; i < a.size(); ++i)
    sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
  return std::sqrt(sum / static_cast<double>(a.size() - from));
}

std::unique_ptr<KvCache> with_basis(const Heads& s, const Tokens& tokens, const std::string& profile) {
  auto cache = make_cache(s, profile);
  const Status status =
      klt_layer(*cache).use_basis(klt_basis_of(s, tokens.k.data(), tokens.v.data(), tokens.n()));
  EXPECT_TRUE(status.ok()) << status.message();
  return cache;
}

TEST(KltLayer, WaitsForTokensAndConverts) {
  const Heads s(6, 3, 16);
  const Tokens tokens(s, 800);
  ASSERT_EQ(tokens_for_klt(s.width()), 512);
  // Wider ones wait until an exact cache would be the larger, the widest for their statistics.
  EXPECT_EQ(tokens_for_klt(128), 576);
  EXPECT_EQ(tokens_for_klt(192), 736);
  EXPECT_EQ(tokens_for_klt(256), 896);
  EXPECT_EQ(tokens_for_klt(1024), 2048);
  for (const bool by_steps : {false, true}) {
    const auto cache = make_cache(s, "klt");
    KltLayer& layer = klt_layer(*cache);
    ASSERT_TRUE(layer.append(tokens.key(0), tokens.value(0), 511).ok());
    const auto q = random_query(s, 3);
    layer.observe_queries(q.data(), 1);
    EXPECT_TRUE(layer.parts().empty());
    EXPECT_TRUE(layer.wants_queries());
    EXPECT_EQ(layer.bytes().n_tokens_in_pages, 0);
    EXPECT_EQ(layer.bytes().basis, 0);  // a query at position 0 is no sample
    const Decoded before(layer);
    if (by_steps) {
      step_tokens(layer, tokens, 511, 513);
    } else {
      ASSERT_TRUE(layer.append(tokens.key(511), tokens.value(511), 1).ok());
    }
    ASSERT_EQ(layer.parts().size(), 1U);
    EXPECT_TRUE(layer.wants_queries());                                       // to find anchors
    EXPECT_TRUE(klt_layer(*make_cache(s, "klt:anchors=0")).wants_queries());  // for the keys' weight
    EXPECT_FALSE(klt_layer(*with_basis(s, tokens, "klt:anchors=0")).wants_queries());
    EXPECT_EQ(layer.bytes().n_tokens_in_pages, 384);  // 512 - 16 - 64, in units of 64
    EXPECT_GT(layer.bytes().basis, 0);
    layer.observe_queries(q.data(), 1);  // too late, and harmless
    const Decoded after(layer, 0, 511);
    const double size = rms(before.k, std::vector<float>(before.k.size()));
    EXPECT_LT(rms(after.k, before.k), 0.3 * size);
    EXPECT_GT(rms(after.k, before.k), 1e-3 * size) << "was anything encoded?";
  }
}

TEST(KltLayer, MoreBitsAreCloser) {
  const Heads s(6, 3, 20);
  const Tokens tokens(s, 700);
  double last_k = 1e9, last_v = 1e9;
  std::vector<float> exact_k;
  for (int64_t t = 0; t < tokens.n(); ++t) {
    for (const double x : tokens.rotated_key(s, t)) exact_k.push_back(static_cast<float>(x));
  }
  for (const char* profile : {"klt:k=1,v=1", "klt:k=2,v=2", "klt:k=4,v=4", "klt:k=8,v=8"}) {
    const auto cache = make_cache(s, profile);
    ASSERT_TRUE(cache->layer(kCompressed).append(tokens.key(0), tokens.value(0), 700).ok());
    const Decoded all(cache->layer(kCompressed));
    const double k = rms(all.k, exact_k), v = rms(all.v, tokens.v);
    // With 8 bits the transforms' own rounding to half precision is all that is left of the keys' error.
    if (profile != std::string("klt:k=8,v=8")) {
      EXPECT_LT(k, 0.75 * last_k) << profile;
    }
    EXPECT_LT(v, 0.75 * last_v) << profile;
    last_k = k;
    last_v = v;
  }
  EXPECT_LT(last_k, 0.01 * rms(exact_k, std::vector<float>(exact_k.size())));
  EXPECT_LT(last_v, 0.02);  // their deviation is 1
}

TEST(KltLayer, SmallNumbersAreStoredAsWell) {
  const Heads s(6, 3, 16);
  for (const float unit : {1e-3F, 1e-2F, 100.0F}) {
    Tokens tokens(s, 700);
    for (float& x : tokens.k) x *= unit;
    for (float& x : tokens.v) x *= unit;
    const auto cache = make_cache(s, "klt");
    const Status status = cache->layer(kCompressed).append(tokens.key(0), tokens.value(0), 700);
    ASSERT_TRUE(status.ok()) << unit << ": " << status.message();
    const Decoded all(cache->layer(kCompressed));
    EXPECT_LT(rms(all.v, tokens.v), 0.3 * static_cast<double>(unit)) << unit;
  }
}

TEST(KltLayer, PiecesMakeTheSameCache) {
  const Heads s(6, 3, 16);
  const Tokens tokens(s, 700);
  const auto whole = with_basis(s, tokens, "klt");
  ASSERT_TRUE(whole->layer(kCompressed).append(tokens.key(0), tokens.value(0), 700).ok());
  ASSERT_TRUE(whole->layer(kCompressed).make_room(true).ok());
  const Decoded want(whole->layer(kCompressed));
  std::mt19937 random(7);
  for (int round = 0; round < 6; ++round) {
    const auto pieces = with_basis(s, tokens, "klt");
    KvLayer& layer = pieces->layer(kCompressed);
    for (int64_t n = 0; n < 700;) {
      const int64_t m =
          std::min<int64_t>(700 - n, 1 + static_cast<int64_t>(random()) % (round % 2 == 0 ? 30 : 300));
      if (random() % 2 == 0) {
        ASSERT_TRUE(layer.append(tokens.key(n), tokens.value(n), m).ok());
      } else {
        step_tokens(layer, tokens, n, n + m);
      }
      n += m;
    }
    ASSERT_TRUE(layer.make_room(true).ok());
    EXPECT_EQ(layer.bytes().total(), whole->layer(kCompressed).bytes().total());
    const Decoded got(layer);
    // Tokens that waited in the window were rounded to f16: a latent near a boundary may get the other code,
    // one in about 2^10 of them, each off by a step. That is the square root of 2^-10 x 12 of the quantiser's
    // own error.
    EXPECT_LT(rms(got.v, want.v), 0.15 * rms(want.v, tokens.v)) << round;
    const double size = rms(want.k, std::vector<float>(want.k.size()));
    EXPECT_LT(rms(got.k, want.k), 0.03 * size) << round;
  }
}

TEST(KltLayer, PagesLeaveTheWindowOneByOne) {
  const Heads s(6, 3, 16);
  const Tokens tokens(s, 600);
  const auto cache = with_basis(s, tokens, "klt:sinks=7,recent=33");
  KvLayer& layer = cache->layer(kCompressed);
  int64_t before = 0, n_left = 0;
  for (int64_t t = 0; t < 600; ++t) {
    step_tokens(layer, tokens, t, t + 1);
    const int64_t now = layer.bytes().n_tokens_in_pages;
    if (now != before) {
      ++n_left;
      ASSERT_EQ(now, before + 64) << t;
      ASSERT_EQ(t + 1, 7 + now + 33) << "leaves as soon as the last 33 are younger";
    }
    before = now;
  }
  EXPECT_EQ(n_left, (600 - 7 - 33) / 64);
}

TEST(KltLayer, ClearForgetsOwnTransformsOnly) {
  const Heads s(6, 3, 16);
  const Tokens tokens(s, 700);
  const auto own = make_cache(s, "klt"), file = with_basis(s, tokens, "klt");
  for (int round = 0; round < 2; ++round) {
    for (const auto* cache : {&own, &file}) {
      KltLayer& layer = klt_layer(**cache);
      ASSERT_TRUE(layer.append(tokens.key(0), tokens.value(0), 700).ok());
      EXPECT_FALSE(layer.parts().empty());
      layer.clear();
      EXPECT_EQ(layer.n_tokens(), 0);
      EXPECT_EQ(layer.bytes().total(), layer.bytes().basis);
      EXPECT_EQ(layer.bytes().basis > 0, cache == &file);  // copies of a file's transforms stay
    }
    EXPECT_TRUE(klt_layer(*own).parts().empty());
    EXPECT_TRUE(klt_layer(*own).wants_queries());
    EXPECT_EQ(klt_layer(*file).parts().size(), 1U);
  }
}

TEST(KltLayer, BytesAreWhatIsAllocated) {
  for (const int64_t head_dim : {20, 64}) {
    const Heads s(4, 4, head_dim);
    const Tokens tokens(s, 960);
    for (const bool from_file : {false, true}) {
      const auto cache = from_file ? with_basis(s, tokens, "klt") : make_cache(s, "klt");
      KltLayer& layer = klt_layer(*cache);
      ASSERT_TRUE(layer.append(tokens.key(0), tokens.value(0), 960).ok());
      int64_t page = 8, basis = 0;  // a page begins with the bits of its anchors
      for (const KltPart& part : layer.parts()) {
        int64_t octets = 0;  // bits of octets: 8 coordinates of 64 tokens are 64 bytes
        for (const auto* t : {&part.key(), &part.value()}) {
          for (int64_t o = 0; o < t->n_coord / 8; ++o) octets += t->octet_bits[static_cast<size_t>(o)];
          page += t->n_coord;
          basis += t->n_coord * t->width * 2;
          basis += static_cast<int64_t>(t->weight.size() * 2 + t->mean.size() * 4 + t->octet_bits.size());
        }
        page += 64 * octets;
        basis += part.width() * part.ld_score() * 4;
      }
      const LayerBytes bytes = layer.bytes();
      EXPECT_EQ(bytes.n_tokens_in_pages, 832);
      EXPECT_EQ(bytes.pages, 13 * page);
      EXPECT_EQ(bytes.exact, (16 + ceil_div(960 - 16 - 832, 16) * 16) * s.width() * 2 * 2);
      EXPECT_GE(bytes.basis, basis);
      // Steps and centres of the index: four floats a coordinate, in vectors that may have doubled their
      // room.
      int64_t n_index = 0;
      for (const KltPart& part : layer.parts()) n_index += part.layout().n_index;
      EXPECT_LE(bytes.basis, basis + 2 * 4 * 4 * n_index);
    }
  }
}

TEST(KltLayer, AFailingWeightLeavesTheLayerAsItWas) {
  const Heads s(6, 3, 16);
  const Tokens tokens(s, 700);
  int n_calls = 0;
  const auto flaky = [&](int64_t layer, std::vector<double>& weight) -> Status {
    if (++n_calls == 1) return {StatusCode::io_error, "the file is gone"};
    const Status status = value_weights(s)(layer, weight);
    if (n_calls == 2) weight[3] = std::numeric_limits<double>::quiet_NaN();
    return status;
  };
  auto cache = KvCache::create(layers_of(s, kLayers), profile_of("klt"), nullptr, flaky);
  ASSERT_TRUE(cache.ok());
  KltLayer& layer = klt_layer(**cache);
  ASSERT_TRUE(layer.append(tokens.key(0), tokens.value(0), 500).ok());
  const Decoded before(layer);
  const LayerBytes bytes = layer.bytes();
  for (const StatusCode code : {StatusCode::io_error, StatusCode::non_finite}) {
    EXPECT_EQ(layer.append(tokens.key(500), tokens.value(500), 200).code(), code);
    EXPECT_EQ(layer.n_tokens(), 500);
    EXPECT_EQ(layer.bytes().total(), bytes.total());
    const Decoded after(layer);
    EXPECT_EQ(before.k, after.k);
    EXPECT_EQ(before.v, after.v);
  }
  ASSERT_TRUE(layer.append(tokens.key(500), tokens.value(500), 200).ok());
  EXPECT_EQ(layer.bytes().n_tokens_in_pages, 576);
}

TEST(KltLayer, NonFiniteIsNamed) {
  const Heads s(6, 3, 16);
  Tokens tokens(s, 700);
  const auto cache = with_basis(s, tokens, "klt");
  KvLayer& layer = cache->layer(kCompressed);
  ASSERT_TRUE(layer.append(tokens.key(0), tokens.value(0), 300).ok());
  const Decoded before(layer);
  tokens.k[static_cast<size_t>(444 * s.width() + 5)] = kNan;
  const Status status = layer.append(tokens.key(300), tokens.value(300), 400);
  EXPECT_EQ(status.code(), StatusCode::non_finite);
  EXPECT_NE(status.message().find("token 444 "), std::string::npos) << status.message();
  const Decoded after(layer);
  EXPECT_EQ(before.k, after.k);
  EXPECT_EQ(before.v, after.v);
}

TEST(KltLayer, PartsAreIndependent) {
  const Heads s(4, 4, 128);  // two parts of two heads
  const Tokens tokens(s, 300);
  const int64_t half = s.width() / 2;
  Tokens swapped = tokens;
  for (int64_t t = 0; t < tokens.n(); ++t) {
    for (auto* x : {&swapped.k, &swapped.v})
      std::rotate(x->begin() + t * 2 * half, x->begin() + t * 2 * half + half,
                  x->begin() + (t + 1) * 2 * half);
  }
  KltLayerBasis basis = klt_basis_of(s, tokens.k.data(), tokens.v.data(), 300);
  ASSERT_EQ(basis.key.size(), 2U);
  const auto a = make_cache(s, "klt"), b = make_cache(s, "klt");
  ASSERT_TRUE(klt_layer(*a).use_basis(basis).ok());
  std::swap(basis.key[0], basis.key[1]);
  std::swap(basis.value[0], basis.value[1]);
  ASSERT_TRUE(klt_layer(*b).use_basis(basis).ok());
  ASSERT_TRUE(a->layer(kCompressed).append(tokens.key(0), tokens.value(0), 300).ok());
  ASSERT_TRUE(b->layer(kCompressed).append(swapped.key(0), swapped.value(0), 300).ok());
  ASSERT_EQ(a->layer(kCompressed).bytes().n_tokens_in_pages, 192);
  Decoded want(a->layer(kCompressed)), got(b->layer(kCompressed));
  for (int64_t t = 0; t < 300; ++t) {
    for (auto* x : {&got.k, &got.v})
      std::rotate(x->begin() + t * 2 * half, x->begin() + t * 2 * half + half,
                  x->begin() + (t + 1) * 2 * half);
  }
  EXPECT_EQ(got.k, want.k);
  EXPECT_EQ(got.v, want.v);
}

TEST(KltLayer, WideLayers) {
  const Heads s(32, 32, 128);
  const Tokens tokens(s, 150);  // fewer than the width of a part: half of the coordinates have no variance
  const auto cache = with_basis(s, tokens, "klt:k=8,v=8");
  KltLayer& layer = klt_layer(*cache);
  ASSERT_EQ(layer.parts().size(), 16U);
  for (const KltPart& part : layer.parts()) EXPECT_GT(part.layout().n_index, 0);
  ASSERT_TRUE(layer.append(tokens.key(0), tokens.value(0), 150).ok());
  ASSERT_EQ(layer.bytes().n_tokens_in_pages, 64);
  const Decoded all(layer);
  // Errors go where their weight is least, so a plain mean of them is above that of 8 bits; a part in the
  // wrong place would be off by 1.
  EXPECT_LT(rms(all.v, tokens.v), 0.05);
  double error = 0, size = 0;
  for (int64_t t = 16; t < 80; ++t) {
    const auto key = tokens.rotated_key(s, t);
    for (size_t c = 0; c < key.size(); ++c) {
      error += std::pow(static_cast<double>(all.k[static_cast<size_t>(t * s.width()) + c]) - key[c], 2);
      size += key[c] * key[c];
    }
  }
  EXPECT_LT(std::sqrt(error / size), 0.02);
}

// However few coordinates are asked for, every part has some: without them all tokens of a page look the
// same.
TEST(KltLayer, EveryPartHasAnIndex) {
  const Heads s(9, 9, 200);  // 9 parts
  const Tokens tokens(s, 40);
  for (const char* profile : {"klt:rank=8", "klt:rank=64"}) {
    const auto cache = with_basis(s, tokens, profile);
    ASSERT_EQ(klt_layer(*cache).parts().size(), 9U);
    for (const KltPart& part : klt_layer(*cache).parts()) EXPECT_GE(part.layout().n_index, 8) << profile;
  }
}

}  // namespace
}  // namespace narrows::test
