// A product of a step with weights of every type, packed or in the file's rows: near the sum in double over
// the weights that the file says, and the same bits however its rows and the inputs' are shared out.
#include "exec/cpu/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "engine/model_parts.h"
#include "exec/random_rows.h"
#include "support/session.h"
#include "support/tiny_cases.h"

namespace narrows::testing {
namespace {

class EveryType : public ::testing::TestWithParam<std::tuple<TinyCase, bool>> {
 protected:
  const TinyCase& tiny() const { return std::get<0>(GetParam()); }
  LoadedTiny load() const { return LoadedTiny(tiny().model, {.repack = std::get<1>(GetParam())}); }
};

std::vector<const Matrix*> matrices(const ModelWeights& weights) {
  std::vector<const Matrix*> all = weights.layer(1).matrices();
  all.push_back(&weights.output());
  return all;
}

TEST_P(EveryType, IsNearTheSumInDouble) {
  const LoadedTiny loaded = load();
  const ModelWeights& weights = *parts_of(*loaded.model).weights;
  const int64_t n_row = 3;
  for (const Matrix* t : matrices(weights)) {
    const int64_t n_in = t->n_in, n_out = t->n_out;
    std::vector<float> x = random_rows(n_row * n_in), w(static_cast<size_t>(n_in * n_out)),
                       y(static_cast<size_t>(n_row * n_out));
    t->unpack(0, n_out, w.data());
    LinearInput input;
    ASSERT_TRUE(input.reserve(n_row, n_in));
    input.set(x.data(), n_in, n_row, n_in);
    Linear(*t).multiply(0, n_out, input, y.data(), n_out, false);
    for (int64_t r = 0; r < n_row; ++r) {
      float top = 0;
      for (int64_t i = 0; i < n_in; ++i) top = std::max(top, std::fabs(x[static_cast<size_t>(r * n_in + i)]));
      for (int64_t o = 0; o < n_out; ++o) {
        double sum = 0, square = 0;
        for (int64_t i = 0; i < n_in; ++i) {
          const double weight = static_cast<double>(w[static_cast<size_t>(o * n_in + i)]);
          sum += weight * static_cast<double>(x[static_cast<size_t>(r * n_in + i)]);
          square += weight * weight;
        }
        // Inputs in at least 8 bits: errors of up to top / 254, evenly spread and independent; 5 deviations.
        const double bound = 5 * std::sqrt(square / 12) * static_cast<double>(top) / 127 + 1e-6;
        ASSERT_NEAR(static_cast<double>(y[static_cast<size_t>(r * n_out + o)]), sum, bound)
            << t->name << " " << r << ", " << o;
      }
    }
  }
}

TEST_P(EveryType, PartsAreTheWhole) {
  const LoadedTiny loaded = load();
  const ModelWeights& weights = *parts_of(*loaded.model).weights;
  const int64_t n_row = 9;
  for (const Matrix* t : matrices(weights)) {
    const Linear whole(*t);
    const int64_t n_in = whole.n_in(), n_out = whole.n_out();
    const std::vector<float> x = random_rows(n_row * n_in);
    std::vector<float> want(static_cast<size_t>(n_row * n_out));
    LinearInput input;
    ASSERT_TRUE(input.reserve(n_row, n_in));
    input.set(x.data(), n_in, n_row, n_in);
    whole.multiply(0, n_out, input, want.data(), n_out, false);
    for (const int64_t step : {16, 32, 80}) {
      for (const int64_t rows : {1, 2, 5}) {
        std::vector<float> y(want.size(), std::nanf(""));
        for (int64_t r = 0; r < n_row; r += rows) {
          input.set(x.data() + r * n_in, n_in, std::min(rows, n_row - r), n_in);
          for (int64_t first = 0; first < n_out; first += step) {
            // Every second part by its own rows, as gate and up are of a joined matrix.
            const int64_t n = std::min(step, n_out - first);
            float* to = y.data() + r * n_out;
            if (first / step % 2 == 0) {
              whole.multiply(first, first + n, input, to, n_out, false);
            } else {
              const Linear part = whole.rows(first, n);
              ASSERT_EQ(part.n_out(), n);
              part.multiply(0, n, input, to + first, n_out, false);
            }
          }
        }
        ASSERT_EQ(max_difference(want, y), 0)
            << t->name << ", " << step << " outputs, " << rows << " rows at once";
      }
    }
    // On top of what is there.
    std::vector<float> y(want.size(), 0.5F);
    input.set(x.data(), n_in, n_row, n_in);
    whole.multiply(0, n_out, input, y.data(), n_out, true);
    for (size_t i = 0; i < y.size(); ++i) ASSERT_EQ(y[i], want[i] + 0.5F);
  }
}

std::string case_name(const ::testing::TestParamInfo<std::tuple<TinyCase, bool>>& info) {
  return std::get<0>(info.param).name + (std::get<1>(info.param) ? "_packed" : "_rows");
}

std::vector<TinyCase> cases() {
  std::vector<TinyCase> all = quantised_cases();
  all.push_back(float_cases().front());
  return all;
}

INSTANTIATE_TEST_SUITE_P(Cases, EveryType,
                         ::testing::Combine(::testing::ValuesIn(cases()), ::testing::Bool()), case_name);

}  // namespace
}  // namespace narrows::testing
