// rope_rows, rope_tile on every target: against double, in place, inverse, rows and tile agree.
#include <vector>

#include "kernels/kernel_test.h"

namespace narrows::kernels {
namespace {

class Rope : public EachTarget {};

struct Shape {
  int64_t head_dim, n_rot;
};

const std::vector<Shape> kShapes = {{32, 32}, {64, 64},   {64, 32},   {80, 80},  {80, 20}, {96, 72},
                                    {96, 2},  {100, 100}, {128, 128}, {128, 64}, {7, 6},   {5, 0}};

/// cos and sin of random angles times a magnitude, [n, ld] with n_half of each row used.
struct Angles {
  Angles(int64_t n, int64_t n_half, int64_t ld, double magnitude, Random& random)
      : cos(n == 0 || n_half == 0 ? 0 : (n - 1) * ld + n_half), sin(cos.size()) {
    std::uniform_real_distribution<double> angle(-4, 4);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n_half; ++j) {
        const double a = angle(random);
        cos[i * ld + j] = static_cast<float>(magnitude * std::cos(a));
        sin[i * ld + j] = static_cast<float>(magnitude * std::sin(a));
      }
    }
  }
  Array<float> cos;
  Array<float> sin;
};

/// Rotated pair within 3 roundings of each term; the inverse rounds its factors (4 + a division) as well.
void expect_pair(double first, double second, double c, double s, bool inverse, float got_first,
                 float got_second) {
  if (inverse) {
    const double square = c * c + s * s;
    c /= square;
    s /= -square;
  }
  const double n_op = inverse ? 9 : 3;
  ASSERT_NEAR(got_first, first * c - second * s,
              gamma(n_op) * (std::fabs(first * c) + std::fabs(second * s)));
  ASSERT_NEAR(got_second, first * s + second * c,
              gamma(n_op) * (std::fabs(first * s) + std::fabs(second * c)));
}

TEST_P(Rope, Rows) {
  Random random(1);
  for (const Shape& shape : kShapes) {
    const int64_t half = shape.n_rot / 2;
    for (const int64_t n_row : {1, 7}) {
      for (const bool one_angle : {true, false}) {
        for (const bool inverse : {false, true}) {
          const int64_t ld = one_angle ? 0 : half + 3;
          const Angles angles(one_angle ? 1 : n_row, half, ld, 1.25, random);
          Array<float> x(n_row * shape.head_dim);
          fill_normal(x, n_row, shape.head_dim, shape.head_dim, random);
          Array<float> y(n_row * shape.head_dim);
          ops().rope_rows(x.data(), n_row, shape.head_dim, shape.n_rot, angles.cos.data(), angles.sin.data(),
                          ld, inverse, y.data());
          for (int64_t r = 0; r < n_row; ++r) {
            const float* from = x.data() + r * shape.head_dim;
            const float* to = y.data() + r * shape.head_dim;
            for (int64_t i = 0; i < half; ++i) {
              expect_pair(from[i], from[i + half], angles.cos[r * ld + i], angles.sin[r * ld + i], inverse,
                          to[i], to[i + half]);
            }
            for (int64_t i = shape.n_rot; i < shape.head_dim; ++i) ASSERT_EQ(to[i], from[i]);
          }
          // In place: the same bits.
          ops().rope_rows(x.data(), n_row, shape.head_dim, shape.n_rot, angles.cos.data(), angles.sin.data(),
                          ld, inverse, x.data());
          for (int64_t i = 0; i < x.size(); ++i) ASSERT_EQ(x[i], y[i]);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(Rope, InverseUndoes) {
  Random random(2);
  for (const double magnitude : {1.0, 1.14, 0.3}) {
    const Angles angles(5, 32, 32, magnitude, random);
    Array<float> x(5 * 64);
    fill_normal(x, 5, 64, 64, random);
    Array<float> y(5 * 64);
    ops().rope_rows(x.data(), 5, 64, 64, angles.cos.data(), angles.sin.data(), 32, false, y.data());
    ops().rope_rows(y.data(), 5, 64, 64, angles.cos.data(), angles.sin.data(), 32, true, y.data());
    for (int64_t r = 0; r < 5; ++r) {
      for (int64_t i = 0; i < 32; ++i) {
        const double a = x[r * 64 + i];
        const double b = x[r * 64 + i + 32];
        // Rotations keep the length of a pair; each of the two passes errs by at most its bound times sqrt 2.
        const double bound = gamma(3 + 9) * 2 * std::hypot(a, b);
        EXPECT_NEAR(y[r * 64 + i], a, bound);
        EXPECT_NEAR(y[r * 64 + i + 32], b, bound);
      }
    }
  }
}

TEST_P(Rope, Tile) {
  Random random(3);
  for (const Shape& shape : kShapes) {
    const int64_t half = shape.n_rot / 2;
    for (const int64_t n : {1, 7, 16, 63, 64}) {
      const int64_t ld = n + 2;
      const int64_t ld_angle = n + 5;
      const Angles angles(half, n, ld_angle, 1.1, random);
      Array<float> x((shape.head_dim - 1) * ld + n);
      fill_normal(x, shape.head_dim, n, ld, random);
      Array<float> y(x.size());
      for (int64_t i = 0; i < x.size(); ++i) y[i] = x[i];
      ops().rope_tile(y.data(), ld, n, shape.head_dim, shape.n_rot, angles.cos.data(), angles.sin.data(),
                      ld_angle);
      for (int64_t i = 0; i < half; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          expect_pair(x[i * ld + j], x[(i + half) * ld + j], angles.cos[i * ld_angle + j],
                      angles.sin[i * ld_angle + j], false, y[i * ld + j], y[(i + half) * ld + j]);
        }
      }
      for (int64_t i = 0; i < shape.head_dim; ++i) {
        for (int64_t j = i < shape.n_rot ? n : 0; j < ld && i * ld + j < x.size(); ++j) {
          if (j < n) {
            ASSERT_EQ(y[i * ld + j], x[i * ld + j]);
          } else {
            ASSERT_TRUE(std::isnan(y[i * ld + j]));
          }
        }
      }
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Rope, EmptyTile) {
  ops().rope_tile(nullptr, 0, 0, 64, 64, nullptr, nullptr, 0);
  ops().rope_rows(nullptr, 0, 64, 64, nullptr, nullptr, 0, false, nullptr);
}

NARROWS_EACH_TARGET(Rope);

}  // namespace
}  // namespace narrows::kernels
