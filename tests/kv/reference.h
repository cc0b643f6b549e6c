// Arithmetic in double for the tests of kv/: half rounding, Jacobi eigenvectors, projections.
// Shares no code with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace narrows::test {

inline constexpr double kHalfEps = 1.0 / 2048;  ///< relative rounding of f16 (11 bits)
/// Nearest binary16 of x, as a double; ties to even.
inline double to_half(double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent = 0;
  std::frexp(x, &exponent);  // |x| in [2^(e-1), 2^e)
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
  const double y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) > 65504 ? std::copysign(std::numeric_limits<double>::infinity(), x) : y;
}

/// Eigenvectors of a symmetric matrix [n, n] by cyclic Jacobi rotations: column c of the result [n, n]
/// belongs to the c-th largest eigenvalue.
inline std::vector<double> jacobi_vectors(std::vector<double> a, int64_t n,
                                          std::vector<double>* values = nullptr) {
  const auto at = [n](std::vector<double>& m, int64_t i, int64_t j) -> double& {
    return m[static_cast<size_t>(i * n + j)];
  };
  std::vector<double> u(a.size());
  for (int64_t i = 0; i < n; ++i) at(u, i, i) = 1;
  for (int sweep = 0; sweep < 30; ++sweep) {
    double off = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i + 1; j < n; ++j) off += at(a, i, j) * at(a, i, j);
    }
    double diagonal = 0;
    for (int64_t i = 0; i < n; ++i) diagonal += at(a, i, i) * at(a, i, i);
    if (off <= 1e-28 * diagonal) break;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        if (at(a, p, q) == 0) continue;
        const double theta = (at(a, q, q) - at(a, p, p)) / (2 * at(a, p, q));
        const double t = std::copysign(1.0, theta) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
        const double c = 1 / std::sqrt(t * t + 1);
        const double s = t * c;
        for (int64_t i = 0; i < n; ++i) {
          const double x = at(a, i, p), y = at(a, i, q);
          at(a, i, p) = c * x - s * y;
          at(a, i, q) = s * x + c * y;
        }
        for (int64_t i = 0; i < n; ++i) {
          const double x = at(a, p, i), y = at(a, q, i);
          at(a, p, i) = c * x - s * y;
          at(a, q, i) = s * x + c * y;
          const double ux = at(u, i, p), uy = at(u, i, q);
          at(u, i, p) = c * ux - s * uy;
          at(u, i, q) = s * ux + c * uy;
        }
      }
    }
  }
  std::vector<int64_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(i)] = i;
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return at(a, x, x) > at(a, y, y); });
  std::vector<double> sorted(u.size());
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t i = 0; i < n; ++i) at(sorted, i, c) = at(u, i, order[static_cast<size_t>(c)]);
    if (values) values->push_back(at(a, order[static_cast<size_t>(c)], order[static_cast<size_t>(c)]));
  }
  return sorted;
}

/// P = U_r U_r^T [D, D] of the first r columns.
inline std::vector<double> projector(const std::vector<double>& u, int64_t d, int64_t rank) {
  std::vector<double> p(static_cast<size_t>(d * d));
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      double sum = 0;
      for (int64_t c = 0; c < rank; ++c)
        sum += u[static_cast<size_t>(i * d + c)] * u[static_cast<size_t>(j * d + c)];
      p[static_cast<size_t>(i * d + j)] = sum;
    }
  }
  return p;
}

inline std::vector<double> times(const std::vector<double>& matrix, const float* x, int64_t d) {
  std::vector<double> y(static_cast<size_t>(d));
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j)
      y[static_cast<size_t>(i)] += matrix[static_cast<size_t>(i * d + j)] * static_cast<double>(x[j]);
  }
  return y;
}

inline double norm(const std::vector<double>& x) {
  double sum = 0;
  for (const double y : x) sum += y * y;
  return std::sqrt(sum);
}

}  // namespace narrows::test
