// Which rows are held, which are missing, who leaves; against a model that keeps a plain map.
#include "kv/klt/klt_hot_keys.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

namespace narrows {
namespace {

struct Held {
  std::vector<int32_t> slot, missing;
};

Held hold(KltHotKeys& keys, const std::vector<int32_t>& tokens) {
  Held out;
  out.slot.assign(tokens.size(), -1);
  out.missing.assign(tokens.size(), -1);
  out.missing.resize(static_cast<size_t>(keys.hold(tokens, out.slot.data(), out.missing.data())));
  return out;
}

/// Writes the token's number into its row.
void write(KltHotKeys& keys, const std::vector<int32_t>& tokens, const Held& held) {
  for (const int32_t i : held.missing)
    keys.row(held.slot[static_cast<size_t>(i)])[0] =
        static_cast<kernels::f16_t>(tokens[static_cast<size_t>(i)]);
}

TEST(KltHotKeys, FirstTimeAllAreMissingThenNone) {
  KltHotKeys keys(4);
  keys.reserve(5);
  const std::vector<int32_t> tokens = {3, 8, 20};
  const Held first = hold(keys, tokens);
  EXPECT_EQ(first.missing, (std::vector<int32_t>{0, 1, 2}));
  const Held again = hold(keys, tokens);
  EXPECT_TRUE(again.missing.empty());
  EXPECT_EQ(again.slot, first.slot);
  EXPECT_TRUE(hold(keys, {}).missing.empty());
}

TEST(KltHotKeys, TheLongestUnreadLeaves) {
  KltHotKeys keys(1);
  keys.reserve(4);
  hold(keys, {1, 2});
  hold(keys, {3, 4});
  hold(keys, {1});                                                // 2 is now the longest unread
  EXPECT_EQ(hold(keys, {5}).missing.size(), 1U);                  // in its place
  EXPECT_TRUE(hold(keys, {1, 3, 4, 5}).missing.empty());          // the others are there
  EXPECT_EQ(hold(keys, {2}).missing, (std::vector<int32_t>{0}));  // 1 leaves: of equals the oldest token
  EXPECT_EQ(hold(keys, {1, 3, 4, 5}).missing, (std::vector<int32_t>{0}));
}

TEST(KltHotKeys, ReserveForgetsNothingAndClearAll) {
  KltHotKeys keys(2);
  keys.reserve(2);
  const std::vector<int32_t> tokens = {7, 9};
  Held held = hold(keys, tokens);
  write(keys, tokens, held);
  const int64_t bytes = keys.bytes();
  keys.reserve(64);
  EXPECT_EQ(keys.capacity(), 64);
  EXPECT_GE(keys.bytes(), bytes + 62 * (2 * 2 + 7 * 4));
  held = hold(keys, tokens);
  EXPECT_TRUE(held.missing.empty());
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(keys.row(held.slot[i])[0], tokens[i]);
  keys.clear();
  EXPECT_EQ(keys.bytes(), 0);
  EXPECT_EQ(keys.capacity(), 0);
  keys.reserve(2);
  EXPECT_EQ(hold(keys, tokens).missing.size(), 2U);
}

TEST(KltHotKeys, RandomStepsAgainstAMap) {
  std::mt19937 random(3);
  for (const int64_t capacity : {1, 7, 40}) {
    KltHotKeys keys(1);
    keys.reserve(capacity);
    std::map<int32_t, int> last_read;  // of what should be held
    for (int step = 1; step < 400; ++step) {
      std::set<int32_t> wanted;
      const auto n = static_cast<size_t>(random() % static_cast<uint32_t>(capacity + 1));
      while (wanted.size() < n) wanted.insert(static_cast<int32_t>(random() % 60));
      const std::vector<int32_t> tokens(wanted.begin(), wanted.end());
      const Held held = hold(keys, tokens);
      std::vector<int32_t> missing;
      for (size_t i = 0; i < tokens.size(); ++i) {
        if (last_read.count(tokens[i]) == 0) missing.push_back(static_cast<int32_t>(i));
      }
      ASSERT_EQ(held.missing, missing) << "step " << step << " capacity " << capacity;
      write(keys, tokens, held);
      for (size_t i = 0; i < tokens.size(); ++i) {
        ASSERT_EQ(keys.row(held.slot[i])[0], tokens[i]) << "step " << step;
        last_read[tokens[i]] = step;
      }
      while (static_cast<int64_t>(last_read.size()) > capacity) {
        auto oldest = last_read.begin();
        for (auto it = last_read.begin(); it != last_read.end(); ++it) {
          if (it->second < oldest->second) oldest = it;
        }
        last_read.erase(oldest);
      }
    }
  }
}

}  // namespace
}  // namespace narrows
