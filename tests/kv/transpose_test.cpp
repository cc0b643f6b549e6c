// Transposes of every small shape, from scattered rows, against one number at a time; nothing outside is
// written.
#include "kv/transpose.h"

#include <gtest/gtest.h>

#include <vector>

namespace narrows {
namespace {

TEST(Transpose, EveryShape) {
  for (int64_t n = 0; n <= 20; ++n) {
    for (int64_t n_column = 0; n_column <= 20; ++n_column) {
      std::vector<std::vector<kernels::f16_t>> rows;
      std::vector<const kernels::f16_t*> pointers;
      for (int64_t r = 0; r < n; ++r) {
        rows.emplace_back();
        for (int64_t c = 0; c < n_column; ++c)
          rows.back().push_back(static_cast<kernels::f16_t>(r * 100 + c));
      }
      for (const auto& row : rows) pointers.push_back(row.data());
      constexpr kernels::f16_t kUntouched = 0xFFFF;
      const int64_t ld = n + 3;
      std::vector<kernels::f16_t> y(static_cast<size_t>(n_column * ld), kUntouched);
      transpose_rows(pointers.data(), n, n_column, y.data(), ld);
      for (int64_t c = 0; c < n_column; ++c) {
        for (int64_t r = 0; r < ld; ++r) {
          const auto want = r < n ? static_cast<kernels::f16_t>(r * 100 + c) : kUntouched;
          ASSERT_EQ(y[static_cast<size_t>(c * ld + r)], want)
              << n << "x" << n_column << " at " << r << "," << c;
        }
      }
    }
  }
}

}  // namespace
}  // namespace narrows
