// Latent pages on every target: layouts by hand, codes and scales against the quantiser's own bounds, scores
// against sums in double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/kernel_test.h"
#include "kernels/latent_page.h"

namespace narrows::kernels {
namespace {

class Latent : public EachTarget {};

/// The oracle's table.
const Ops& ref() { return *available_targets().back(); }

double amplitude(int s) { return std::exp2((s - kScaleBias) / 8.0); }

/// Random falling bits of 1 to 8 for octets of n_coord coordinates; the octets of the padding have 1.
std::vector<uint8_t> falling_bits(int64_t n_coord, Random& random) {
  std::vector<uint8_t> bits(static_cast<size_t>(n_coord / kOctet));
  for (uint8_t& b : bits) b = static_cast<uint8_t>(1 + random() % 8);
  std::sort(bits.rbegin(), bits.rend());
  bits.resize(static_cast<size_t>(pad_latent(n_coord) / kOctet), 1);
  return bits;
}

TEST(LatentPage, AmplitudesAreEighthsOfOctaves) {
  for (int s = 0; s < 256; ++s) EXPECT_NEAR(kAmplitude[static_cast<size_t>(s)] / amplitude(s), 1, kUnit) << s;
}

TEST(LatentPage, EveryTokenHasASlot) {
  std::vector<bool> taken(kTile);
  for (int64_t t = 0; t < kTile; ++t) {
    ASSERT_TRUE(index_slot(t) >= 0 && index_slot(t) < kTile) << t;
    EXPECT_FALSE(taken[static_cast<size_t>(index_slot(t))]) << t;
    taken[static_cast<size_t>(index_slot(t))] = true;
  }
}

TEST(LatentPage, PlanesArePrefixes) {
  const uint8_t bits[] = {4, 2, 2, 1, 0};
  const PlaneRow row = make_plane_row(bits, 5);
  EXPECT_EQ(row.n_plane, 4);
  EXPECT_EQ(row.n_octet, 4);
  EXPECT_EQ(row.bytes, 4 + 3 + 1 + 1);
  const int32_t octets[] = {4, 3, 1, 1}, offset[] = {0, 4, 7, 8};
  for (size_t j = 0; j < 4; ++j) {
    EXPECT_EQ(row.octets[j], octets[j]) << j;
    EXPECT_EQ(row.offset[j], offset[j]) << j;
  }
  const PlaneRow none = make_plane_row(bits + 4, 1);
  EXPECT_EQ(none.n_plane, 0);
  EXPECT_EQ(none.n_octet, 0);
  EXPECT_EQ(none.bytes, 0);
}

// --- quant_latents

/// Latents [kTile, ldz] whose padding is NaN: it is read, but must not matter.
struct Latents {
  int64_t n_coord;
  int64_t ldz;
  Array<float> z;
  explicit Latents(int64_t n) : n_coord(n), ldz(pad_latent(n)), z(kTile * ldz) {}
  float& at(int64_t t, int64_t c) { return z[t * ldz + c]; }
  void fill(Random& random, float sigma = 1) { fill_normal(z, kTile, n_coord, ldz, random, sigma); }
};

struct Quantised {
  Array<uint8_t> scales;
  Array<uint8_t> codes;
  int64_t ldc;
  bool ok;
  Quantised(const Ops& ops, const Latents& x, const std::vector<uint8_t>& bits)
      : scales(x.n_coord), codes(kTile * (pad_latent(x.n_coord) + 5)), ldc(pad_latent(x.n_coord) + 5) {
    ok = ops.quant_latents(x.z.data(), x.ldz, x.n_coord, bits.data(), scales.data(), codes.data(), ldc);
  }
};

/// Squared error of a coordinate, and how far rounding in float may have put it.
struct Error {
  double sum = 0;
  double slack = 0;
};

Error error_of(Latents& x, const Quantised& q, int64_t c, int bits) {
  Error e;
  const double step = static_cast<double>(kAmplitude[q.scales[c]]) * std::exp2(2 - bits);
  for (int64_t t = 0; t < kTile; ++t) {
    const double z = x.at(t, c);
    const double value = (q.codes[t * q.ldc + c] - std::exp2(bits - 1) + 0.5) * step;
    e.sum += (z - value) * (z - value);
    e.slack += 2 * std::fabs(z - value) * 3 * kUnit * (std::fabs(z) + std::fabs(value));
  }
  e.slack += gamma(70) * e.sum;
  return e;
}

void check_quant(const Ops& ops, Latents& x, const std::vector<uint8_t>& bits) {
  const Quantised got(ops, x, bits), want(ref(), x, bits);
  ASSERT_TRUE(got.ok && want.ok);
  for (int64_t c = 0; c < x.n_coord; ++c) {
    const int b = bits[static_cast<size_t>(c / kOctet)];
    double top = 0;
    for (int64_t t = 0; t < kTile; ++t) top = std::max(top, static_cast<double>(std::fabs(x.at(t, c))));
    int widest = 1;  // of the scales tried: the first whose range holds all
    while (widest < 255 && 2 * static_cast<double>(kAmplitude[static_cast<size_t>(widest)]) <= top) ++widest;
    ASSERT_LE(got.scales[c], widest) << c;
    ASSERT_GE(got.scales[c], std::max(0, widest - 12)) << c;
    const float step = kAmplitude[got.scales[c]] * std::ldexp(1.0F, 2 - b);
    for (int64_t t = 0; t < kTile; ++t) {
      const int code = got.codes[t * got.ldc + c];
      ASSERT_LT(code, 1 << b);
      const float cell = std::floor(x.at(t, c) / step) + std::ldexp(1.0F, b - 1);
      ASSERT_EQ(code, static_cast<int>(std::clamp(cell, 0.0F, std::ldexp(1.0F, b) - 1))) << c << " " << t;
    }
    const Error mine = error_of(x, got, c, b), best = error_of(x, want, c, b);
    ASSERT_LE(mine.sum, best.sum + mine.slack + best.slack) << "coordinate " << c << " bits " << b;
    // The widest scale clips nothing, so no number is further off than half its step.
    const double half = static_cast<double>(kAmplitude[static_cast<size_t>(widest)]) * std::exp2(1 - b);
    ASSERT_LE(mine.sum, kTile * half * half + mine.slack) << "coordinate " << c << " bits " << b;
  }
}

TEST_P(Latent, QuantisesEveryWidthAndBits) {
  Random random(1);
  for (const int64_t n_coord : {8, 16, 24, 32, 40, 64, 72}) {
    for (int b = 1; b <= 8; ++b) {
      Latents x(n_coord);
      x.fill(random);
      check_quant(ops(), x,
                  std::vector<uint8_t>(static_cast<size_t>(x.ldz / kOctet), static_cast<uint8_t>(b)));
      if (HasFatalFailure()) return;
    }
    for (int i = 0; i < 8; ++i) {
      Latents x(n_coord);
      x.fill(random);
      check_quant(ops(), x, falling_bits(n_coord, random));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Latent, QuantisesNumbersOfAllSizes) {
  Random random(2);
  for (const float sigma : {1e-38F, 1e-9F, 1e-5F, 1e-3F, 0.1F, 30.0F, 20000.0F}) {
    Latents x(24);
    x.fill(random, sigma);
    for (int64_t c = 0; c < 8; ++c)
      x.at(7 * c, c) = 15 * sigma * (c % 2 == 0 ? 1.0F : -1.0F);  // worth clipping?
    if (sigma > 1000) {
      for (int64_t i = 0; i < kTile * x.ldz; ++i) x.z[i] = std::clamp(x.z[i], -119000.0F, 119000.0F);
    }
    for (int i = 0; i < 4; ++i) check_quant(ops(), x, falling_bits(24, random));
    if (HasFatalFailure()) return;
  }
  // Exactly at amplitudes, where one scale ends and the next begins.
  for (int s = 3; s < 256; s += 5) {
    Latents x(8);
    x.fill(random, kAmplitude[static_cast<size_t>(s)] / 8);
    for (int64_t c = 0; c < 8; ++c) {
      const float edge = kAmplitude[static_cast<size_t>(s)];
      x.at(c, c) = c % 3 == 0 ? edge : c % 3 == 1 ? std::nextafter(edge, 0.0F) : -std::nextafter(edge, kInf);
    }
    check_quant(ops(), x, falling_bits(8, random));
    if (HasFatalFailure()) return;
  }
}

TEST_P(Latent, ZerosTakeTheSmallestScale) {
  Latents x(24);
  for (int64_t t = 0; t < kTile; ++t) {
    for (int64_t c = 0; c < 24; ++c) x.at(t, c) = c % 2 == 0 ? 0.0F : -0.0F;
  }
  const std::vector<uint8_t> bits = {8, 3, 1, 1};
  check_quant(ops(), x, bits);
  const Quantised q(ops(), x, bits);
  for (int64_t c = 0; c < 24; ++c) EXPECT_EQ(q.scales[c], 0);
}

TEST_P(Latent, RefusesWhatHasNoScale) {
  Random random(3);
  const float end = static_cast<float>(std::exp2(135 / 8.0));  // twice the amplitude after the last
  for (const int64_t n_coord : {8, 24}) {
    for (const float bad : {kNaN, kInf, -kInf, end * 1.0001F, -end * 1.0001F, 3e38F}) {
      for (int64_t c = 0; c < n_coord; ++c) {
        Latents x(n_coord);
        x.fill(random);
        const auto bits = falling_bits(n_coord, random);
        const auto t = static_cast<int64_t>(random() % kTile);
        x.at(t, c) = bad;
        ASSERT_FALSE(Quantised(ops(), x, bits).ok) << bad << " at " << t << ", " << c;
        x.at(t, c) = std::copysign(end * 0.9999F, bad);
        ASSERT_TRUE(Quantised(ops(), x, bits).ok) << t << ", " << c;
      }
    }
  }
}

// --- unpack_planes

TEST_P(Latent, PlanesAddHalvingAmplitudes) {
  const uint8_t bits[] = {3, 1};
  const PlaneRow shape = make_plane_row(bits, 2);
  ASSERT_EQ(shape.bytes, 4);
  Array<uint8_t> row(4);
  row[0] = 0b11110000;  // plane 0, octets 0 and 1
  row[1] = 0b00000010;
  row[2] = 0b11001100;  // plane 1, octet 0
  row[3] = 0b10101010;  // plane 2, octet 0
  Array<float> amplitude(16), z(16);
  for (int64_t c = 0; c < 16; ++c) amplitude[c] = 4;
  ops().unpack_planes(row.data(), shape, amplitude.data(), z.data());
  for (int64_t c = 0; c < 8; ++c) EXPECT_EQ(z[c], static_cast<float>(2 * c - 7)) << c;  // codes 0 .. 7
  for (int64_t c = 8; c < 16; ++c) EXPECT_EQ(z[c], c == 9 ? 4.0F : -4.0F) << c;
}

TEST_P(Latent, UnpacksAnyBits) {
  Random random(4);
  for (int64_t n_octet = 0; n_octet <= 9; ++n_octet) {
    for (int i = 0; i < 40; ++i) {
      const auto bits = falling_bits(n_octet * kOctet, random);
      const PlaneRow shape = make_plane_row(bits.data(), n_octet);
      Array<uint8_t> row(shape.bytes);
      for (int64_t b = 0; b < shape.bytes; ++b) row[b] = static_cast<uint8_t>(random());
      const int64_t padded = pad_latent(n_octet * kOctet);
      const bool powers = i % 2 == 0;  // their multiples are exact, so every target has the same bits
      Array<float> amplitude(padded), got(padded), want(padded);
      for (int64_t c = 0; c < n_octet * kOctet; ++c)
        amplitude[c] = kAmplitude[powers ? random() % 32 * 8 : random() % 256];
      ops().unpack_planes(row.data(), shape, amplitude.data(), got.data());
      ref().unpack_planes(row.data(), shape, amplitude.data(), want.data());
      for (int64_t c = 0; c < n_octet * kOctet; ++c) {
        const double error = std::fabs(static_cast<double>(got[c]) - static_cast<double>(want[c]));
        ASSERT_LE(error, powers ? 0 : gamma(9) * 2 * static_cast<double>(amplitude[c]))
            << n_octet << " " << c;
      }
    }
  }
}

// --- expand_index

TEST_P(Latent, ExpandsTheIndexInOrderOfTokens) {
  Random random(5);
  for (const int64_t n_octet : {1, 2, 3, 5, 8}) {
    for (const int max_bits : {1, kScoreBits, 8}) {
      for (int i = 0; i < 6; ++i) {
        const auto bits = falling_bits(n_octet * kOctet, random);
        int64_t n_byte = 0;
        for (int64_t o = 0; o < n_octet; ++o) n_byte += bits[static_cast<size_t>(o)] * kOctet * kTile / 8;
        Array<uint8_t> planes(n_byte), codes(2 * n_octet * kTile * 4);
        for (int64_t b = 0; b < n_byte; ++b) planes[b] = 0;
        // Packed here bit by bit, from codes of whole bits.
        std::vector<int> want;
        int64_t at = 0;
        for (int64_t c = 0; c < n_octet * kOctet; ++c) {
          const int b = bits[static_cast<size_t>(c / kOctet)];
          for (int64_t t = 0; t < kTile; ++t) {
            const int code = static_cast<int>(random() % (1U << b));
            want.push_back(code >> std::max(0, b - max_bits));
            for (int j = 0; j < b; ++j) {
              const int bit = code >> (b - 1 - j) & 1;
              uint8_t& byte = planes[at + j * kTile / 8 + index_slot(t) / 8];
              byte = static_cast<uint8_t>(byte | bit << (index_slot(t) % 8));
            }
          }
          at += b * kTile / 8;
        }
        Array<uint8_t> octets(n_octet);
        for (int64_t o = 0; o < n_octet; ++o) octets[o] = bits[static_cast<size_t>(o)];
        ops().expand_index(planes.data(), octets.data(), n_octet, max_bits, codes.data());
        for (int64_t c = 0; c < n_octet * kOctet; ++c) {
          for (int64_t t = 0; t < kTile; ++t) {
            ASSERT_EQ(codes[c / 4 * 4 * kTile + t * 4 + c % 4], want[static_cast<size_t>(c * kTile + t)])
                << "coordinate " << c << " token " << t;
          }
        }
      }
    }
  }
}

// --- score_index

struct ScoreCase {
  int64_t n_coord;
  int64_t n_row;
  Array<uint8_t> codes;
  Array<float> u;
  int64_t ldu;
  Array<float> step;
  Array<float> centre;

  ScoreCase(int64_t n_coord_in, int64_t n_row_in, Random& random)
      : n_coord(n_coord_in),
        n_row(n_row_in),
        codes(n_coord * kTile),
        u(n_row * (n_coord + 4)),
        ldu(n_coord + 4),
        step(n_coord),
        centre(n_coord) {
    fill_normal(u, n_row, n_coord + 1, ldu, random);
    for (int64_t c = 0; c < n_coord; ++c) {
      const auto bits = static_cast<int>(1 + random() % kScoreBits);
      step[c] = kAmplitude[100 + random() % 40];
      centre[c] = std::ldexp(1.0F, bits - 1) - 0.5F;
      for (int64_t t = 0; t < kTile; ++t) {
        // All ones in one coordinate of each pair tests that sums of pairs do not saturate.
        codes[c / 4 * 4 * kTile + t * 4 + c % 4] =
            static_cast<uint8_t>(t % 16 == 3 ? (1U << bits) - 1 : random() % (1U << bits));
      }
    }
  }
};

void check_score(const Ops& ops, const ScoreCase& x, int64_t first, int64_t n) {
  const int64_t lds = kTile + 7;
  Array<float> score(x.n_row * lds);
  ops.score_index(x.codes.data(), x.n_coord, x.u.data(), x.ldu, x.n_row, x.step.data(), x.centre.data(),
                  first, n, score.data(), lds);
  for (int64_t r = 0; r < x.n_row; ++r) {
    double top = 0;
    for (int64_t c = 0; c < x.n_coord; ++c)
      top = std::max(top, static_cast<double>(std::fabs(x.u[r * x.ldu + c] * x.step[c])));
    const double unit = top / 127;
    const double constant = x.u[r * x.ldu + x.n_coord];
    for (int64_t t = 0; t < lds; ++t) {
      if (t < first || t >= first + n) {
        ASSERT_TRUE(std::isnan(score[r * lds + t])) << "written outside of the block: " << t;
        continue;
      }
      double want = constant, size = 0, ties = 0;
      for (int64_t c = 0; c < x.n_coord && unit > 0; ++c) {
        const double weight = static_cast<double>(x.u[r * x.ldu + c] * x.step[c]) / unit;
        const double code = x.codes[c / 4 * 4 * kTile + t * 4 + c % 4];
        const double off = code - static_cast<double>(x.centre[c]);
        want += unit * std::nearbyint(weight) * off;
        size += unit * std::fabs(std::nearbyint(weight)) * (code + static_cast<double>(x.centre[c]));
        // Rounding may fall either way where the float product is a tie but for its own rounding.
        if (std::fabs(std::fabs(weight - std::floor(weight)) - 0.5) < 4 * 127 * kUnit)
          ties += unit * std::fabs(off);
      }
      const double bound = gamma(static_cast<double>(x.n_coord) + 8) * (size + std::fabs(constant)) + ties;
      ASSERT_NEAR(score[r * lds + t], want, bound) << "row " << r << " token " << t << " of " << x.n_coord;
    }
  }
}

TEST_P(Latent, ScoresEveryShape) {
  Random random(6);
  for (const int64_t n_coord : {0, 8, 16, 24, 32, 40, 48, 56, 64, 520}) {
    for (int64_t n_row = 1; n_row <= 9; ++n_row) {
      const ScoreCase x(n_coord, n_row, random);
      for (const int64_t n : {16, 32, 64}) {
        for (int64_t first = 0; first < kTile; first += n) check_score(ops(), x, first, n);
      }
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Latent, ScoresAtTheEdgesOfBytes) {
  Random random(7);
  // Every weight +-127, every code 63: the largest sums of pairs there are.
  ScoreCase x(64, 3, random);
  for (int64_t c = 0; c < 64; ++c) {
    x.step[c] = 0.5F;
    x.centre[c] = 31.5F;
    for (int64_t r = 0; r < 3; ++r)
      x.u[r * x.ldu + c] = r == 0 ? 2.0F : r == 1 ? -2.0F : c % 2 == 0 ? 2.0F : -2.0F;
    for (int64_t t = 0; t < kTile; ++t) x.codes[c * kTile + t] = 63;
  }
  check_score(ops(), x, 0, kTile);
  // A query of zeros leaves the constant alone.
  for (int64_t c = 0; c < 64; ++c) x.u[c] = 0;
  check_score(ops(), x, 16, 16);
}

// --- softmax_part

TEST_P(Latent, SoftmaxOfEveryLength) {
  Random random(8);
  std::normal_distribution<float> normal(0, 5);
  for (int64_t n = 1; n <= 200; ++n) {
    Array<float> s(n);
    for (int64_t i = 0; i < n; ++i) s[i] = normal(random) + 100;
    for (int64_t i = 1; i < n; i += 9) s[i] = i % 2 == 0 ? -1e4F : -3e38F;
    std::vector<double> x;
    double top = -1e300;
    for (int64_t i = 0; i < n; ++i) {
      x.push_back(s[i]);
      top = std::max(top, x.back());
    }
    float max = kNaN, sum = kNaN;
    ops().softmax_part(s.data(), n, &max, &sum);
    ASSERT_EQ(max, static_cast<float>(top)) << n;
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double off = x[static_cast<size_t>(i)] - top;
      // The difference is rounded (its own size), exp adds a few units in the last place.
      ASSERT_NEAR(s[i], std::exp(off), std::exp(off) * kUnit * (std::fabs(off) + 6)) << n << " " << i;
      if (off < -87.3) {
        ASSERT_EQ(s[i], 0) << n << " " << i;
      }
      total += static_cast<double>(s[i]);
    }
    ASSERT_NEAR(sum, total, gamma(static_cast<double>(n)) * total) << n;
  }
}

TEST_P(Latent, SoftmaxEndsAtTheSmallestNormalNumber) {
  Array<float> s(35);
  for (int64_t i = 0; i < 35; ++i) s[i] = i == 20 ? 0.0F : i % 2 == 0 ? -87.25F : -87.35F;
  float max = kNaN, sum = kNaN;
  ops().softmax_part(s.data(), 35, &max, &sum);
  EXPECT_EQ(max, 0);
  EXPECT_EQ(sum, 1);
  for (int64_t i = 0; i < 35; ++i) {
    if (i == 20) continue;
    EXPECT_EQ(s[i] > 0, i % 2 == 0) << i;
  }
}

TEST_P(Latent, ScoresBecomeProbabilitiesNearly) {
  Random random(9);
  std::normal_distribution<float> normal(0, 6);
  for (int64_t n = 1; n <= 100; ++n) {
    Array<float> s(n);
    for (int64_t i = 0; i < n; ++i) s[i] = i == 3 ? -3e38F : normal(random) - 40;
    const std::vector<float> x(s.data(), s.data() + n);
    const float top = *std::max_element(x.begin(), x.end());
    float max = kNaN, sum = kNaN;
    ops().softmax_scores(s.data(), n, &max, &sum);
    ASSERT_EQ(max, top);
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double want = std::exp(static_cast<double>(x[static_cast<size_t>(i)]) - static_cast<double>(top));
      ASSERT_NEAR(s[i], want, 1e-4 * want + 1e-37) << n << " " << i;
      total += want;
    }
    ASSERT_NEAR(sum, total, 1e-4 * total) << n;
  }
}

NARROWS_EACH_TARGET(Latent);

}  // namespace
}  // namespace narrows::kernels
