// The checksum: the same however the bytes come, another one for every change of a bit.
#include "base/checksum.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>

namespace narrows {
namespace {

uint64_t of(const std::string& bytes) {
  Checksum sum;
  sum.add(bytes.data(), bytes.size());
  return sum.value();
}

std::string random_bytes(size_t n) {
  std::mt19937 random(3);
  std::string bytes(n, '\0');
  for (char& c : bytes) c = static_cast<char>(random());
  return bytes;
}

TEST(Checksum, PiecesAreTheWhole) {
  const std::string bytes = random_bytes(1000);
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    Checksum sum;
    for (size_t at = 0; at < bytes.size();) {
      const size_t n = std::min<size_t>(bytes.size() - at, random() % 80);
      sum.add(bytes.data() + at, n);
      at += n;
    }
    ASSERT_EQ(sum.value(), of(bytes));
  }
}

TEST(Checksum, EveryBitAndEveryLengthCounts) {
  std::set<uint64_t> seen;
  size_t n = 0;
  for (size_t size = 0; size < 100; ++size, ++n) seen.insert(of(std::string(size, '\0')));
  for (const size_t size : {1, 31, 32, 33, 200}) {
    std::string bytes = random_bytes(size);
    seen.insert(of(bytes));
    ++n;
    for (size_t bit = 0; bit < 8 * size; ++bit, ++n) {
      bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << bit % 8));
      seen.insert(of(bytes));
      bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << bit % 8));
    }
  }
  EXPECT_EQ(seen.size(), n);
}

TEST(Checksum, SwappedPiecesDiffer) {
  const std::string a = random_bytes(64), b(64, 'x');
  EXPECT_NE(of(a + b), of(b + a));
  std::string swapped = a;
  std::swap_ranges(swapped.begin(), swapped.begin() + 8, swapped.begin() + 8);
  EXPECT_NE(of(a), of(swapped));
}

}  // namespace
}  // namespace narrows
