// quant_groups, dequant_groups on every target: the layout by hand, the rule value by value, and the same
// bytes from every target (a snapshot of the cache may move between machines).
#include <algorithm>
#include <vector>

#include "kernels/kernel_test.h"

namespace narrows::kernels {
namespace {

class Groups : public EachTarget {};

int64_t n_group(int64_t n) { return (n + kGroup - 1) / kGroup; }
int64_t n_byte(int64_t n, int bits) { return n_group(n) * kGroup * bits / 8; }

TEST_P(Groups, Layout) {
  // scale 0.5, zero -1
  const std::vector<f16_t> params = {0x3800, 0xBC00, 0x3C00, 0x0000};
  std::vector<float> y(64);
  Array<uint8_t> four(2 * 16);
  for (int64_t i = 0; i < 16; ++i) four[i] = static_cast<uint8_t>(i | (15 - i) << 4);
  for (int64_t i = 16; i < 32; ++i) four[i] = 0x21;
  ops().dequant_groups(four.data(), params.data(), 64, 4, y.data());
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(y[static_cast<size_t>(i)], static_cast<float>(i) / 2 - 1);
    EXPECT_EQ(y[static_cast<size_t>(16 + i)], static_cast<float>(15 - i) / 2 - 1);
    EXPECT_EQ(y[static_cast<size_t>(32 + i)], 1);
    EXPECT_EQ(y[static_cast<size_t>(48 + i)], 2);
  }
  Array<uint8_t> two(2 * 8);
  for (int64_t i = 0; i < 8; ++i) two[i] = 0b11'10'01'00;
  for (int64_t i = 8; i < 16; ++i) two[i] = i == 11 ? 0b01'00'00'00 : 0;
  ops().dequant_groups(two.data(), params.data(), 64, 2, y.data());
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQ(y[static_cast<size_t>(i)], static_cast<float>(i / 8) / 2 - 1);
    EXPECT_EQ(y[static_cast<size_t>(32 + i)], i == 24 + 3 ? 1 : 0);
  }
}

/// Quantises, checks each code and parameter against the rule, dequantises.
void check(const Ops& ops, const Array<float>& x, int bits) {
  const int64_t n = x.size();
  Array<uint8_t> codes(n_byte(n, bits));
  Array<f16_t> params(2 * n_group(n));
  ASSERT_TRUE(ops.quant_groups(x.data(), n, bits, codes.data(), params.data()));
  Array<float> y(n);
  ops.dequant_groups(codes.data(), params.data(), n, bits, y.data());
  const int64_t width = kGroup * bits / 8;
  const int top = (1 << bits) - 1;
  for (int64_t g = 0; g < n_group(n); ++g) {
    const int64_t first = g * kGroup;
    const int64_t end = std::min(n, first + kGroup);
    float low = x[first];
    float high = x[first];
    for (int64_t i = first; i < end; ++i) {
      low = std::min(low, x[i]);
      high = std::max(high, x[i]);
    }
    low += 0.0F;  // -0 counts as +0
    high += 0.0F;
    ASSERT_EQ(params[2 * g], float_to_half((high - low) / static_cast<float>(top)));
    ASSERT_EQ(params[2 * g + 1], float_to_half(low));
    const double scale = half_to_float(params[2 * g]);
    const double zero = half_to_float(params[2 * g + 1]);
    for (int64_t i = 0; i < kGroup; ++i) {
      const int code = codes[g * width + i % width] >> (i / width * bits) & top;
      if (first + i >= end || scale == 0) {
        ASSERT_EQ(code, 0) << "unused, or a constant group";
      }
      if (first + i >= end) continue;
      // scale and zero have 11 bits, code 4: product and sum are exact in float but for one rounding.
      ASSERT_EQ(y[first + i], static_cast<float>(zero + scale * code));
      if (scale == 0) continue;
      const double wanted = (double{x[first + i]} - zero) / scale;
      const double nearest = std::min<double>(top, std::max(0.0, wanted));
      // Nearest, up to the rounding of the float quotient.
      ASSERT_LE(std::fabs(code - nearest), 0.5 + 3 * kUnit * (std::fabs(wanted) + 1)) << x[first + i];
    }
  }
}

TEST_P(Groups, EveryLength) {
  Random random(1);
  for (const int bits : {2, 4}) {
    for (int64_t n = 0; n <= 200; ++n) {
      Array<float> x(n);
      fill_normal(x, 1, n, n, random, 3);
      check(ops(), x, bits);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Groups, ManyGroupsOfAllSizesOfNumbers) {
  Random random(2);
  for (const int bits : {2, 4}) {
    for (const float sigma : {1e-7F, 1e-5F, 1e-3F, 1.0F, 100.0F, 10000.0F}) {
      for (const float shift : {0.0F, 1000.0F, -3.0F}) {
        Array<float> x(kGroup * 100);
        fill_normal(x, 1, x.size(), x.size(), random, sigma);
        for (int64_t i = 0; i < x.size(); ++i) x[i] = std::clamp(x[i] + shift, -60000.0F, 60000.0F);
        check(ops(), x, bits);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(Groups, EdgesOfTheRange) {
  for (const int bits : {2, 4}) {
    Array<float> x(kGroup);
    for (int64_t i = 0; i < kGroup; ++i) x[i] = i % 2 == 0 ? kHalfMax : -kHalfMax;
    check(ops(), x, bits);
    for (int64_t i = 0; i < kGroup; ++i) x[i] = 0.1F;  // constant: scale 0, zero rounded
    check(ops(), x, bits);
    for (int64_t i = 0; i < kGroup; ++i) x[i] = 1 + static_cast<float>(i) * 0x1p-23F;  // scale rounds to 0
    check(ops(), x, bits);
    for (int64_t i = 0; i < kGroup; ++i) x[i] = 1000.3F + static_cast<float>(i) * 0x1p-12F;  // codes clamp
    check(ops(), x, bits);
    for (const int64_t negative : {0, 1}) {  // both orders: a minimum of 0 and -0 may be either
      for (int64_t i = 0; i < kGroup; ++i) x[i] = i % 2 == negative ? -0.0F : 0.0F;
      check(ops(), x, bits);
    }
  }
}

TEST_P(Groups, RefusesWhatHalfCannotHold) {
  Random random(3);
  for (const int bits : {2, 4}) {
    for (const float bad : {kNaN, kInf, -kInf, 65505.0F, -65505.0F, 1e30F}) {
      for (const int64_t n : {20, 64, 100}) {
        for (int64_t where = 0; where < n; ++where) {
          Array<float> x(n);
          fill_normal(x, 1, n, n, random);
          Array<uint8_t> codes(n_byte(n, bits));
          Array<f16_t> params(2 * n_group(n));
          ASSERT_TRUE(ops().quant_groups(x.data(), n, bits, codes.data(), params.data()));
          x[where] = bad;
          ASSERT_FALSE(ops().quant_groups(x.data(), n, bits, codes.data(), params.data()))
              << bad << " at " << where;
        }
      }
    }
  }
}

TEST_P(Groups, NonFiniteParametersDoNotCrash) {
  const std::vector<f16_t> params = {0x7C00, 0x7E00};
  std::vector<uint8_t> codes(16, 0xFF);
  std::vector<float> y(32);
  ops().dequant_groups(codes.data(), params.data(), 32, 4, y.data());
  for (const float value : y) EXPECT_TRUE(std::isnan(value));
}

NARROWS_EACH_TARGET(Groups);

}  // namespace
}  // namespace narrows::kernels
