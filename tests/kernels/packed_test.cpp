// packed_product and what feeds it, on every target: inputs rounded to the same bytes everywhere; products
// with weights and inputs whose sums float holds exactly, to the bit; others within the bound of rounding.
// What a packed weight is, is tested against ggml in tests/model/matrix_test.cpp.
#include <algorithm>
#include <numeric>

#include "kernels/bf16.h"
#include "kernels/packed_data.h"

namespace narrows::kernels {
namespace {

class PackedProduct : public EachTarget {};

/// y [n_row, n_out] as rows of ldy, NaN between them.
Array<float> product(const Ops& ops, const Packed& w, Bytes& x, int64_t n_row, int64_t ldy) {
  Array<float> y((n_row - 1) * ldy + w.matrix.n_out);
  ops.packed_product(w.matrix, 0, pack_tiles(w.matrix.n_out), x.rows(), n_row, y.data(), ldy, false);
  return y;
}

TEST_P(PackedProduct, TilesUnpackToTheirRowsRounded) {
  Random random(5);
  std::vector<float> halves = {0, 1, -1, 65504, 6e-8F, -3e-6F, 0.3333F};
  std::normal_distribution<float> normal(0, 0.05F);
  for (int i = 0; i < 200; ++i) halves.push_back(normal(random));
  constexpr uint16_t kUntouched = 0x1234;
  for (const Packing p : kAllPackings) {
    for (const int64_t blocks : {1, 2, 5}) {
      const int64_t n_in = blocks * inputs_at_once(p), n_out = 37, ld = 19;
      const Packed w(p, n_in, n_out, halves, random);
      std::vector<float> row(static_cast<size_t>(n_in));
      for (int64_t t = 0; t < pack_tiles(n_out); ++t) {
        Array<uint16_t> got(n_in * ld);
        std::fill_n(got.data(), got.size(), kUntouched);
        ops().unpack_tile(w.matrix, t, got.data(), ld);
        for (int64_t r = 0; r < ld; ++r) {
          const int64_t o = t * kPackRows + r;
          if (r < kPackRows) unpack_row(w.matrix, o, row.data());
          for (int64_t k = 0; k < n_in; ++k) {
            const uint16_t want = r < kPackRows ? float_to_bf16(row[static_cast<size_t>(k)]) : kUntouched;
            ASSERT_EQ(got[k * ld + r], want) << packing_name(p) << ", row " << o << ", input " << k;
          }
        }
      }
    }
  }
}

// Scales that are powers of two and small inputs: every sum of theirs is a float.
TEST_P(PackedProduct, IsExactWhereFloatIs) {
  Random random(1);
  for (const Packing p : kAllPackings) {
    for (const int64_t blocks : {1, 2, 3}) {
      const int64_t n_in = blocks * inputs_at_once(p);
      for (const int64_t n_out : {1, 15, 16, 17, 32, 43}) {
        const Packed w(p, n_in, n_out, {0.25F, 0.5F, -1.0F, 0.0F, -0.5F}, random);
        for (const int64_t n_row : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17}) {
          Array<float> x(n_row * n_in);
          std::uniform_int_distribution<int> small(-3, 3);
          for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(small(random));
          // A 127 (or a multiple) in every group makes the scale a power of two.
          for (int64_t i = 0; i < x.size(); i += kPackGroup)
            x[i + i / kPackGroup % kPackGroup] = 127 * (i % 3 == 0 ? 2.0F : 1.0F);
          Bytes bytes(n_row, n_in);
          ops().round_rows(x.data(), n_in, n_row, n_in, bytes.rows());
          const int64_t ldy = n_out + 3;
          const Array<float> y = product(ops(), w, bytes, n_row, ldy);
          std::vector<float> weight(static_cast<size_t>(n_in));
          for (int64_t o = 0; o < n_out; ++o) {
            unpack_row(w.matrix, o, weight.data());
            for (int64_t r = 0; r < n_row; ++r) {
              double sum = 0;
              for (int64_t k = 0; k < n_in; ++k) {
                sum += double{bytes.scale[(r * n_in + k) / kPackGroup]} * bytes.code[r * n_in + k] *
                       weight[static_cast<size_t>(k)];
              }
              ASSERT_EQ(y[r * ldy + o], static_cast<float>(sum))
                  << packing_name(p) << " [" << n_out << ", " << n_in << "], row " << r << " of " << n_row
                  << ", output " << o;
            }
          }
          for (int64_t r = 0; r + 1 < n_row; ++r) {
            for (int64_t o = n_out; o < ldy; ++o)
              ASSERT_TRUE(std::isnan(y[r * ldy + o])) << "written between rows";
          }
        }
      }
    }
  }
}

TEST_P(PackedProduct, WithinTheBoundOfRounding) {
  Random random(2);
  constexpr float kLargest = 0.02F;
  std::vector<float> halves;
  std::uniform_real_distribution<float> some(-kLargest, kLargest);
  for (int i = 0; i < 50; ++i) halves.push_back(some(random));
  for (const Packing p : kAllPackings) {
    for (const int64_t n_in : {256, 768, 2048}) {
      const int64_t n_out = 50, n_row = 11, n_group = n_in / kPackGroup;
      const Packed w(p, n_in, n_out, halves, random);
      Array<float> x(n_row * n_in);
      fill_normal(x, n_row, n_in, n_in, random, 3);
      Bytes bytes(n_row, n_in);
      ops().round_rows(x.data(), n_in, n_row, n_in, bytes.rows());
      const Array<float> y = product(ops(), w, bytes, n_row, n_out);
      Array<float> want(n_row * n_out);
      available_targets().back()->packed_product(w.matrix, 0, pack_tiles(n_out), bytes.rows(), n_row,
                                                 want.data(), n_out, false);
      // Largest scale and minimum of an input, and what a code can be.
      const double times = is_super(p) ? (p == Packing::q6_k ? 128 : 63) : 1;
      const double weight =
          kLargest * times * ((1 << (number_bits(p) - (has_minimum(p) ? 0 : 1))) + (has_minimum(p) ? 1 : 0));
      for (int64_t r = 0; r < n_row; ++r) {
        double inputs = 0;
        for (int64_t g = 0; g < n_group; ++g) {
          for (int64_t k = 0; k < kPackGroup; ++k) {
            inputs += std::fabs(double{bytes.scale[r * n_group + g]} *
                                bytes.code[(r * n_group + g) * kPackGroup + k]);
          }
        }
        for (int64_t o = 0; o < n_out; ++o) {
          ASSERT_LE(std::fabs(double{y[r * n_out + o]} - double{want[r * n_out + o]}),
                    gamma(static_cast<double>(2 * n_group + 6)) * inputs * weight)
              << packing_name(p) << " " << n_in << " inputs, row " << r << ", output " << o;
        }
      }
    }
  }
}

// A decode step of many sequences is that of each; threads may share out the tiles as they like.
TEST_P(PackedProduct, DependsOnNeitherRowsNorParts) {
  Random random(3);
  const int64_t n_out = 100, n_row = 17;
  for (const Packing p : kAllPackings) {
    const int64_t n_in = 3 * inputs_at_once(p);
    const Packed w(p, n_in, n_out, {0.01F, 0.017F, -0.003F, 0.0007F}, random);
    Array<float> x(n_row * n_in);
    fill_normal(x, n_row, n_in, n_in, random);
    Bytes bytes(n_row, n_in);
    ops().round_rows(x.data(), n_in, n_row, n_in, bytes.rows());
    const Array<float> all = product(ops(), w, bytes, n_row, n_out);
    for (const int64_t at_once : {1, 2, 3, 5, 8, 13}) {
      for (const int64_t tiles : {1, 2, 5}) {
        Array<float> y(n_row * n_out);
        for (int64_t r = 0; r < n_row; r += at_once) {
          for (int64_t t = 0; t < pack_tiles(n_out); t += tiles) {
            ops().packed_product(w.matrix, t, std::min(tiles, pack_tiles(n_out) - t), bytes.from(r, n_in),
                                 std::min(at_once, n_row - r), y.data() + r * n_out, n_out, false);
          }
        }
        for (int64_t i = 0; i < y.size(); ++i) {
          ASSERT_EQ(y[i], all[i]) << packing_name(p) << ", " << at_once << " rows and " << tiles
                                  << " tiles at once, at " << i;
        }
      }
    }
  }
}

TEST_P(PackedProduct, AddsUp) {
  Random random(4);
  const int64_t n_in = 512, n_out = 37, n_row = 3;
  for (const Packing p : kAllPackings) {
    const Packed w(p, n_in, n_out, {0.01F, -0.02F}, random);
    Array<float> x(n_row * n_in), before(n_row * n_out);
    fill_normal(x, n_row, n_in, n_in, random);
    fill_normal(before, n_row, n_out, n_out, random);
    Bytes bytes(n_row, n_in);
    ops().round_rows(x.data(), n_in, n_row, n_in, bytes.rows());
    const Array<float> alone = product(ops(), w, bytes, n_row, n_out);
    Array<float> y(n_row * n_out);
    std::copy_n(before.data(), y.size(), y.data());
    ops().packed_product(w.matrix, 0, pack_tiles(n_out), bytes.rows(), n_row, y.data(), n_out, true);
    for (int64_t i = 0; i < y.size(); ++i) {
      ASSERT_NEAR(double{y[i]}, double{before[i]} + double{alone[i]},
                  1e-6 * (std::fabs(before[i]) + std::fabs(alone[i])))
          << packing_name(p);
    }
  }
}

// Codes at both ends of their range, inputs too: the 16-bit sums of targets without VNNI must hold them.
TEST_P(PackedProduct, HoldsTheLargestSums) {
  for (const Packing p : kAllPackings) {
    for (const int filling : {0x00, 0xFF, 0x80, 0x7F}) {
      Random random(5);
      const int64_t n_in = inputs_at_once(p), n_out = 16;
      Packed w(p, n_in, n_out, {1.0F}, random);
      const int64_t row = file_row_bytes(p, n_in);
      for (int64_t r = 0; r < n_out; ++r) {
        uint8_t* block = w.file.data() + r * row;
        std::fill_n(block, row, static_cast<uint8_t>(filling));
        const f16_t one = 0x3C00;
        std::memcpy(block + (p == Packing::q6_k ? 208 : 0), &one, 2);
        if (has_minimum(p)) std::memcpy(block + 2, &one, 2);
      }
      const uint8_t* rows[kPackRows];
      for (int64_t r = 0; r < kPackRows; ++r) rows[r] = w.file.data() + r * row;
      pack_tile(p, n_in, rows, w.tiles.data());
      for (const float sign : {1.0F, -1.0F}) {
        Array<float> x(n_in);
        for (int64_t k = 0; k < n_in; ++k) x[k] = sign * 127;
        Bytes bytes(1, n_in);
        ops().round_rows(x.data(), n_in, 1, n_in, bytes.rows());
        const Array<float> y = product(ops(), w, bytes, 1, n_out);
        std::vector<float> weight(static_cast<size_t>(n_in));
        for (int64_t o = 0; o < n_out; ++o) {
          unpack_row(w.matrix, o, weight.data());
          const double sum = std::accumulate(weight.begin(), weight.end(), 0.0) * double{sign} * 127;
          ASSERT_EQ(y[o], static_cast<float>(sum)) << packing_name(p) << " filled with " << filling;
        }
      }
    }
  }
}

NARROWS_EACH_TARGET(PackedProduct);

class RoundRows : public EachTarget {};

TEST_P(RoundRows, SameBytesEverywhere) {
  Random random(6);
  for (const int64_t n_in : {32, 96, 576, 1536}) {
    for (const float sigma : {1e-30F, 1e-3F, 1.0F, 1e4F, 1e30F}) {
      const int64_t n_row = 3, ldx = n_in + 5;
      Array<float> x((n_row - 1) * ldx + n_in);
      fill_normal(x, n_row, n_in, ldx, random, sigma);
      for (int64_t k = 0; k < 32; ++k) x[ldx + k] = 0;                                   // a group of zeros
      for (int64_t k = 0; k < 32; ++k) x[2 * ldx + k] = 1e-44F * static_cast<float>(k);  // and of subnormals
      Bytes ours(n_row, n_in), reference(n_row, n_in);
      ops().round_rows(x.data(), ldx, n_row, n_in, ours.rows());
      available_targets().back()->round_rows(x.data(), ldx, n_row, n_in, reference.rows());
      for (int64_t i = 0; i < n_row * n_in; ++i) {
        ASSERT_EQ(ours.code[i], reference.code[i]) << i;
        const double scale = double{ours.scale[i / kPackGroup]};
        const double error = double{x[i / n_in * ldx + i % n_in]} - scale * ours.code[i];
        ASSERT_LE(std::fabs(error), scale * (0.5 + 1e-4) + 0x1p-126 * 127) << i;
        ASSERT_LE(std::abs(ours.code[i]), 127);
      }
      for (int64_t g = 0; g < ours.scale.size(); ++g) {
        int32_t sum = 0;
        for (int64_t k = 0; k < kPackGroup; ++k) sum += ours.code[g * kPackGroup + k];
        ASSERT_EQ(ours.minus[g], -sum);
        ASSERT_EQ(ours.minus_half[2 * g] + ours.minus_half[2 * g + 1], -sum);
        ASSERT_EQ(ours.minus_half[2 * g], reference.minus_half[2 * g]);
        ASSERT_EQ(ours.scale[g], reference.scale[g]);
        ASSERT_EQ(ours.total[g], reference.total[g]);
        ASSERT_EQ(ours.total[g], ours.scale[g] * static_cast<float>(sum));
      }
    }
  }
}

TEST_P(RoundRows, WhatIsNoNumberStaysNone) {
  Random random(9);
  const int64_t n_in = 256, n_out = 20;
  const Packed w(Packing::q4_k, n_in, n_out, {0.01F}, random);
  for (const float bad : {kNaN, kInf, -kInf}) {
    for (int64_t where = 0; where < 64; ++where) {
      Array<float> x(2 * n_in);
      fill_normal(x, 2, n_in, n_in, random);
      x[where] = bad;
      Bytes bytes(2, n_in);
      ops().round_rows(x.data(), n_in, 2, n_in, bytes.rows());
      for (int64_t g = 0; g < 16; ++g) ASSERT_EQ(std::isnan(bytes.scale[g]), g == where / kPackGroup);
      const Array<float> y = product(ops(), w, bytes, 2, n_out);
      for (int64_t o = 0; o < n_out; ++o) {
        ASSERT_TRUE(std::isnan(y[o]));
        ASSERT_TRUE(std::isfinite(y[n_out + o]));
      }
    }
  }
}

NARROWS_EACH_TARGET(RoundRows);

class StepVectors : public EachTarget {};

TEST_P(StepVectors, NormOfEveryLength) {
  Random random(7);
  for (int64_t n = 1; n <= 300; ++n) {
    Array<float> x(n), weight(n), y(n), want(n);
    fill_normal(x, 1, n, n, random, 5);
    fill_normal(weight, 1, n, n, random);
    ops().rms_norm(x.data(), weight.data(), n, 1e-5F, y.data());
    available_targets().back()->rms_norm(x.data(), weight.data(), n, 1e-5F, want.data());
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_NEAR(double{y[i]}, double{want[i]},
                  gamma(static_cast<double>(n + 8)) * std::fabs(double{want[i]}))
          << n;
    }
    ops().rms_norm(x.data(), weight.data(), n, 1e-5F, x.data());  // in place
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(x[i], y[i]);
  }
}

/// op against the oracle's; relative(gate): the error of a result, as a share of it.
template <class Relative>
void check_gated(decltype(Ops::swiglu) Ops::*op, uint32_t seed, Relative&& relative) {
  Random random(seed);
  for (int64_t n = 1; n <= 100; ++n) {
    for (const float sigma : {0.1F, 5.0F, 1000.0F}) {
      Array<float> gate(n), up(n), y(n), want(n);
      fill_normal(gate, 1, n, n, random, sigma);
      fill_normal(up, 1, n, n, random);
      if (n > 4) gate[0] = 0, gate[1] = -0.0F, gate[2] = 3e38F, gate[3] = -3e38F;
      (ops().*op)(gate.data(), up.data(), n, y.data());
      (available_targets().back()->*op)(gate.data(), up.data(), n, want.data());
      for (int64_t i = 0; i < n; ++i) {
        if (std::isinf(want[i])) {
          ASSERT_EQ(y[i], want[i]);
          continue;
        }
        const double bound = relative(double{gate[i]}) * std::fabs(double{want[i]}) + 1e-35;
        ASSERT_NEAR(double{y[i]}, double{want[i]}, bound) << gate[i] << " " << up[i];
      }
      (ops().*op)(gate.data(), up.data(), n, gate.data());
      for (int64_t i = 0; i < n; ++i) ASSERT_EQ(gate[i], y[i]);
    }
  }
}

TEST_P(StepVectors, SwigluOfEveryLengthAndSize) {
  // exp: 2^-22; below e^-87 it is 0, and so then is gate times it, up to 88 e^-87.
  check_gated(&Ops::swiglu, 8, [](double) { return 0x1p-20; });
}

TEST_P(StepVectors, GegluOfEveryLengthAndSize) {
  // As swiglu, but the exponent is rounded itself: some 2^-23 of it.
  check_gated(&Ops::geglu, 9, [](double g) {
    const double exponent = 1.5957691 * std::fabs(g + 0.044715 * g * g * g);
    return 0x1p-20 + 0x1p-21 * std::min(exponent, 90.0);
  });
}

TEST_P(StepVectors, ClampedSwigluOfEveryLengthAndSize) {
  check_gated(&Ops::swiglu_clamped, 10,
              [](double g) { return 0x1p-20 + 0x1p-21 * std::min(1.702 * std::fabs(g), 90.0); });
  // Beyond the limits, at them, and no numbers.
  const float gate[] = {7, 7.5F, 1e30F, -8, 2, 2, 2, NAN, 1, INFINITY, -INFINITY};
  const float up[] = {1, 1, 1, 1, 7.5F, -7.5F, INFINITY, 1, NAN, -INFINITY, 3};
  float y[11];
  ops().swiglu_clamped(gate, up, 11, y);
  const auto want = [](double g, double u) { return g / (1 + std::exp(-1.702 * g)) * (u + 1); };
  const double wants[] = {want(7, 1), want(7, 1),  want(7, 1), want(-8, 1),
                          want(2, 7), want(2, -7), want(2, 7)};
  for (int i = 0; i < 7; ++i) EXPECT_NEAR(double{y[i]}, wants[i], 1e-5 * std::fabs(wants[i]) + 1e-6) << i;
  EXPECT_TRUE(std::isnan(y[7]) && std::isnan(y[8]));
  EXPECT_NEAR(y[9], want(7, -7), 1e-4);
}

NARROWS_EACH_TARGET(StepVectors);

}  // namespace
}  // namespace narrows::kernels
