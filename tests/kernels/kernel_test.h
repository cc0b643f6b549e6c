// Helpers of the kernel tests: one run a target, arrays that expose reads out of range, error bounds.
// Bounds are the standard ones of rounding analysis (Higham, ch. 3): a float dot product of k terms in any
// order is within k u / (1 - k u) times sum |a| |b| of the exact one, u = 2^-24.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>

#include "kernels/half.h"
#include "kernels/ops.h"

namespace narrows::kernels {

inline constexpr double kUnit = 0x1p-24;  ///< half a unit in the last place of 1.0F
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();

/// Growth of rounding errors over n operations.
inline double gamma(double n) { return n * kUnit / (1 - n * kUnit); }

/// Elements that end exactly where the allocation ends, so that AddressSanitizer sees one read too far;
/// begins `offset` elements after an aligned address. Filled with NaN (all bits set) until written.
template <class T>
class Array {
 public:
  explicit Array(int64_t n, int64_t offset = 1)
      : n_(n), offset_(offset), all_(std::make_unique<T[]>(static_cast<size_t>(n + offset))) {
    for (int64_t i = 0; i < n + offset; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        all_[static_cast<size_t>(i)] = kNaN;
      } else {
        all_[static_cast<size_t>(i)] = static_cast<T>(~T{0});
      }
    }
  }
  T* data() { return all_.get() + offset_; }
  const T* data() const { return all_.get() + offset_; }
  T& operator[](int64_t i) { return all_[static_cast<size_t>(i + offset_)]; }
  const T& operator[](int64_t i) const { return all_[static_cast<size_t>(i + offset_)]; }
  int64_t size() const { return n_; }

 private:
  int64_t n_;
  int64_t offset_;
  std::unique_ptr<T[]> all_;
};

using Random = std::mt19937;

/// Normal values in columns [0, n) of each of m rows; columns from n to ld keep their NaN.
inline void fill_normal(Array<float>& x, int64_t m, int64_t n, int64_t ld, Random& random, float sigma = 1) {
  std::normal_distribution<float> normal(0, sigma);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) x[i * ld + j] = normal(random);
  }
}

/// The halves of x; NaN stays NaN.
inline Array<f16_t> to_halves(const Array<float>& x) {
  Array<f16_t> y(x.size());
  for (int64_t i = 0; i < x.size(); ++i) y[i] = float_to_half(x[i]);
  return y;
}

inline double as_double(float x) { return x; }
inline double as_double(f16_t x) { return half_to_float(x); }

/// 64-byte aligned scratch.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : at_(new (std::align_val_t(64)) std::byte[static_cast<size_t>(bytes)]) {}
  ~Scratch() { ::operator delete[](at_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() { return at_; }
  float* floats() { return static_cast<float*>(get()); }

 private:
  std::byte* at_;
};

/// A test that runs once for each table of available_targets(), "ref" included.
class EachTarget : public ::testing::TestWithParam<const Ops*> {
 protected:
  const Ops& ops() const { return *GetParam(); }
};

inline std::string target_name(const ::testing::TestParamInfo<const Ops*>& info) { return info.param->name; }

}  // namespace narrows::kernels

/// Instantiates the suite for every target that runs here.
#define NARROWS_EACH_TARGET(suite) \
  INSTANTIATE_TEST_SUITE_P(All, suite, ::testing::ValuesIn(available_targets()), target_name)
