// f16 <-> f32 on every target: all 65536 halves, the rounding boundaries of every pair of neighbours, odd
// lengths.
#include <bit>
#include <vector>

#include "kernels/kernel_test.h"

namespace narrows::kernels {
namespace {

class Convert : public EachTarget {};

/// What a half means, from the definition of binary16.
double meaning(f16_t half) {
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 0x3FF;
  double magnitude = 0;
  if (exponent == 31) {
    magnitude = mantissa == 0 ? HUGE_VAL : std::nan("");
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, -24);
  } else {
    magnitude = std::ldexp(1024 + mantissa, exponent - 25);
  }
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

bool is_nan(f16_t half) { return (half & 0x7C00) == 0x7C00 && (half & 0x3FF) != 0; }

TEST_P(Convert, EveryHalfToFloat) {
  Array<f16_t> x(65536);
  Array<float> y(65536);
  for (int64_t i = 0; i < 65536; ++i) x[i] = static_cast<f16_t>(i);
  ops().f16_to_f32(x.data(), y.data(), 65536);
  for (int64_t i = 0; i < 65536; ++i) {
    const double expected = meaning(static_cast<f16_t>(i));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(y[i])) << i;
    } else {
      ASSERT_EQ(y[i], expected) << i;
      ASSERT_EQ(std::signbit(y[i]), (i & 0x8000) != 0) << i;
    }
  }
}

TEST_P(Convert, EveryHalfSurvivesTheRoundTrip) {
  Array<f16_t> x(65536);
  Array<float> y(65536);
  Array<f16_t> z(65536);
  for (int64_t i = 0; i < 65536; ++i) x[i] = static_cast<f16_t>(i);
  ops().f16_to_f32(x.data(), y.data(), 65536);
  ops().f32_to_f16(y.data(), z.data(), 65536);
  for (int64_t i = 0; i < 65536; ++i) {
    if (is_nan(x[i])) {
      ASSERT_TRUE(is_nan(z[i])) << i;
    } else {
      ASSERT_EQ(z[i], x[i]);
    }
  }
}

// Between neighbours a < b of the positive halves (b may be "65536", the first that overflows): the midpoint
// goes to the even one, the floats on either side of it to the nearer one.
TEST_P(Convert, RoundsToNearestEven) {
  std::vector<float> x;
  std::vector<f16_t> expected;
  for (int i = 0; i < 0x7C00; ++i) {
    const double a = meaning(static_cast<f16_t>(i));
    const double b = i == 0x7BFF ? 65536.0 : meaning(static_cast<f16_t>(i + 1));
    const float middle = static_cast<float>((a + b) / 2);
    const f16_t low = static_cast<f16_t>(i);
    const f16_t high = static_cast<f16_t>(i + 1);
    x.insert(x.end(), {std::nextafter(middle, 0.0F), middle, std::nextafter(middle, 1e9F)});
    expected.insert(expected.end(), {low, i % 2 == 0 ? low : high, high});
  }
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<f16_t> y(x.size());
  for (const int sign : {1, -1}) {
    std::vector<float> signed_x = x;
    for (float& value : signed_x) value *= static_cast<float>(sign);
    ops().f32_to_f16(signed_x.data(), y.data(), n);
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(y[i], expected[i] | (sign < 0 ? 0x8000 : 0)) << signed_x[i];
    }
  }
}

TEST_P(Convert, ExtremeFloats) {
  const std::vector<float> x = {0.0F,   -0.0F, 0x1p-149F, 0x1p-126F, 0x1p-25F, 0x1.000002p-25F, 1e30F,
                                -1e30F, kInf,  -kInf,     kNaN,      -kNaN,    3.4e38F};
  std::vector<f16_t> y(x.size());
  ops().f32_to_f16(x.data(), y.data(), static_cast<int64_t>(x.size()));
  const std::vector<f16_t> expected = {0, 0x8000, 0, 0, 0, 1, 0x7C00, 0xFC00, 0x7C00, 0xFC00};
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(y[i], expected[i]) << x[i];
  EXPECT_TRUE(is_nan(y[10]));
  EXPECT_TRUE(is_nan(y[11]));
  EXPECT_EQ(y[12], 0x7C00);
}

TEST_P(Convert, EveryLengthTouchesOnlyItsElements) {
  for (int64_t n = 0; n <= 70; ++n) {
    Array<float> x(n);
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(i) - 30.5F;
    std::vector<f16_t> half(static_cast<size_t>(n) + 1, 0x1234);
    ops().f32_to_f16(x.data(), half.data(), n);
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(meaning(half[static_cast<size_t>(i)]), x[i]);
    ASSERT_EQ(half.back(), 0x1234);
    Array<f16_t> h(n);
    for (int64_t i = 0; i < n; ++i) h[i] = half[static_cast<size_t>(i)];
    std::vector<float> back(static_cast<size_t>(n) + 1, 7);
    ops().f16_to_f32(h.data(), back.data(), n);
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(back[static_cast<size_t>(i)], x[i]);
    ASSERT_EQ(back.back(), 7);
  }
}

NARROWS_EACH_TARGET(Convert);

}  // namespace
}  // namespace narrows::kernels
