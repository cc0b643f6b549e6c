// select_top on every target against a stable sort: ties, signed zeros, infinities, scores that share their
// top bits.
#include <algorithm>
#include <bit>
#include <numeric>
#include <vector>

#include "kernels/kernel_test.h"

namespace narrows::kernels {
namespace {

class SelectTop : public EachTarget {};

std::vector<int32_t> expected_top(const Array<float>& score, int64_t count) {
  std::vector<int32_t> order(static_cast<size_t>(score.size()));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return score[a] > score[b]; });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

void check(const Ops& ops, const Array<float>& score, int64_t count) {
  constexpr int32_t kUntouched = -77;
  std::vector<int32_t> got(static_cast<size_t>(count) + 1, kUntouched);
  const int64_t n_byte = select_scratch_bytes(score.size());
  Array<uint64_t> scratch((n_byte + 7) / 8);  // 8-byte aligned and no more
  ops.select_top(score.data(), score.size(), count, got.data(), scratch.data());
  ASSERT_EQ(got.back(), kUntouched);
  got.pop_back();
  ASSERT_EQ(got, expected_top(score, count)) << "n " << score.size() << ", count " << count;
}

void check_counts(const Ops& ops, const Array<float>& score) {
  const int64_t n = score.size();
  for (const int64_t count : {int64_t{0}, int64_t{1}, int64_t{2}, n / 8, n / 2, n - 1, n}) {
    if (count >= 0 && count <= n) check(ops, score, count);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST_P(SelectTop, EveryLength) {
  Random random(1);
  for (int64_t n = 0; n <= 130; ++n) {
    Array<float> score(n);
    fill_normal(score, 1, n, n, random);
    check_counts(ops(), score);
    if (HasFatalFailure()) return;
  }
}

TEST_P(SelectTop, EveryCount) {
  Random random(2);
  Array<float> score(77);
  fill_normal(score, 1, 77, 77, random);
  for (int64_t i = 0; i < 77; i += 3) score[i] = 0.5F;
  for (int64_t count = 0; count <= 77; ++count) check(ops(), score, count);
}

TEST_P(SelectTop, LongRows) {
  Random random(3);
  for (const int64_t n : {1000, 8192, 32768, 100003}) {
    for (const float sigma : {1e-3F, 1.0F, 1e20F}) {
      Array<float> score(n);
      fill_normal(score, 1, n, n, random, sigma);
      check_counts(ops(), score);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(SelectTop, TiesGoToTheLowerIndex) {
  Random random(4);
  std::uniform_int_distribution<int> level(-2, 2);
  for (const int64_t n : {5, 64, 100, 1000, 70000}) {
    Array<float> score(n);
    for (int64_t i = 0; i < n; ++i) score[i] = static_cast<float>(level(random));
    check_counts(ops(), score);
    for (int64_t i = 0; i < n; ++i) score[i] = 3;
    check_counts(ops(), score);
    if (HasFatalFailure()) return;
  }
}

TEST_P(SelectTop, SignedZerosAreEqual) {
  Array<float> score(200);
  for (int64_t i = 0; i < 200; ++i) score[i] = i % 3 == 0 ? -0.0F : 0.0F;
  score[150] = -1e-30F;
  for (int64_t count = 0; count <= 200; count += 7) check(ops(), score, count);
}

TEST_P(SelectTop, InfinitiesAreOrdered) {
  Random random(5);
  Array<float> score(300);
  fill_normal(score, 1, 300, 300, random);
  for (int64_t i = 0; i < 300; i += 10) score[i] = i % 20 == 0 ? -kInf : kInf;
  for (int64_t count = 0; count <= 300; count += 11) check(ops(), score, count);
}

// Scores whose keys agree in the top 11 or 22 bits need the later passes; both signs.
TEST_P(SelectTop, CloseScores) {
  Random random(6);
  for (const uint32_t base : {0x3F800000U, 0xBF800000U, 0x00000000U}) {
    for (const uint32_t spread : {1U, 1000U, 5000U, 3000000U}) {
      std::uniform_int_distribution<uint32_t> low(0, spread);
      Array<float> score(3000);
      for (int64_t i = 0; i < 3000; ++i) score[i] = std::bit_cast<float>(base + low(random));
      check_counts(ops(), score);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(SelectTop, SortedRows) {
  Array<float> score(5000);
  for (int64_t i = 0; i < 5000; ++i) score[i] = static_cast<float>(i);
  check_counts(ops(), score);
  for (int64_t i = 0; i < 5000; ++i) score[i] = static_cast<float>(-i);
  check_counts(ops(), score);
}

// NaN must not crash, hang or write out of range; the indices are still distinct and ascending.
TEST_P(SelectTop, NaNIsHarmless) {
  Random random(7);
  Array<float> score(500);
  fill_normal(score, 1, 500, 500, random);
  for (int64_t i = 0; i < 500; i += 9) score[i] = i % 2 == 0 ? kNaN : -kNaN;
  std::vector<int32_t> got(101, -77);
  Array<uint64_t> scratch((select_scratch_bytes(500) + 7) / 8);
  ops().select_top(score.data(), 500, 100, got.data(), scratch.data());
  EXPECT_EQ(got.back(), -77);
  for (size_t i = 1; i < 100; ++i) EXPECT_LT(got[i - 1], got[i]);
  EXPECT_GE(got[0], 0);
  EXPECT_LT(got[99], 500);
}

NARROWS_EACH_TARGET(SelectTop);

}  // namespace
}  // namespace narrows::kernels
