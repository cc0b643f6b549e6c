// StageClock: every nanosecond between start and stop belongs to one stage; off, it counts nothing.
#include "kv/step/stage_clock.h"

#include <gtest/gtest.h>

#include <numeric>
#include <thread>

namespace narrows::test {
namespace {

TEST(StageClock, TimeBelongsToTheStageThatWasEntered) {
  StageClock clock;
  const int64_t begin = monotonic_ns();
  clock.start(begin);
  clock.enter(AttentionStage::score);
  std::this_thread::sleep_for(std::chrono::milliseconds(3));
  clock.enter(AttentionStage::select);
  clock.enter(AttentionStage::rebuild);
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  const int64_t end = monotonic_ns();
  const StageClock::Times times = clock.stop(end);
  EXPECT_GE(times[static_cast<size_t>(AttentionStage::score)], 3'000'000);
  EXPECT_GE(times[static_cast<size_t>(AttentionStage::rebuild)], 2'000'000);
  EXPECT_EQ(std::accumulate(times.begin(), times.end(), int64_t{0}), end - begin);
}

TEST(StageClock, BeginsInAttend) {
  StageClock clock;
  clock.start(1000);
  EXPECT_EQ(clock.stop(1500), (StageClock::Times{0, 0, 0, 500}));
}

TEST(StageClock, CountsNothingWhileOff) {
  StageClock clock;
  clock.enter(AttentionStage::score);
  EXPECT_EQ(clock.stop(1'000'000), StageClock::Times{});
  clock.start(10);
  clock.stop(30);
  clock.enter(AttentionStage::score);
  EXPECT_EQ(clock.stop(50), (StageClock::Times{0, 0, 0, 20}));
  clock.start(100);
  EXPECT_EQ(clock.stop(101), (StageClock::Times{0, 0, 0, 1}));
}

}  // namespace
}  // namespace narrows::test
