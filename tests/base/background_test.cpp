// Jobs behind their owner's back: all are done, loops within them too, whoever helps.
#include "base/background.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>

namespace narrows {
namespace {

std::unique_ptr<Background> make(int n) {
  auto made = Background::create(n);
  EXPECT_TRUE(made.ok());
  return std::move(*made);
}

TEST(Background, DoesAllThatItIsGiven) {
  for (const int n : {1, 2, 5}) {
    const auto threads = make(n);
    std::vector<int> done(300, 0);
    for (size_t i = 0; i < done.size(); ++i) {
      threads->give([&done, i] { ++done[i]; });
      if (i % 100 == 99) {
        threads->wait();
        EXPECT_EQ(done[i], 1);
      }
    }
    threads->wait();
    EXPECT_EQ(done, std::vector<int>(300, 1));
  }
}

TEST(Background, JobsThatWaitAreDoneBeforeItEnds) {
  std::atomic<int> done{0};
  {
    const auto threads = make(2);
    for (int i = 0; i < 50; ++i) threads->give([&] { ++done; });
  }
  EXPECT_EQ(done, 50);
}

TEST(Background, ThreadsHelpEachOthersLoops) {
  for (const int n : {1, 3, 6}) {
    const auto threads = make(n);
    std::vector<std::vector<int>> done(20, std::vector<int>(64, 0));
    std::atomic<int> bad{0};
    for (auto& of : done) {
      threads->give([&, n] {
        threads->for_each_thread(std::ssize(of), [&](int64_t i, int ith) {
          ++of[static_cast<size_t>(i)];
          if (ith < 0 || ith >= n) ++bad;
        });
        for (const int x : of) bad += x != 1;  // the loop is over
      });
    }
    threads->wait();
    EXPECT_EQ(bad, 0);
    EXPECT_EQ(done, std::vector<std::vector<int>>(20, std::vector<int>(64, 1)));
  }
}

TEST(Background, AnExceptionOfALoopReachesItsJob) {
  const auto threads = make(3);
  std::atomic<int> caught{0}, done{0};
  for (int i = 0; i < 10; ++i) {
    threads->give([&] {
      try {
        threads->for_each(40, [&](int64_t k) {
          if (k == 7) throw std::runtime_error("seven");
          ++done;
        });
      } catch (const std::runtime_error&) {
        ++caught;
      }
    });
  }
  threads->wait();
  EXPECT_EQ(caught, 10);
  EXPECT_EQ(done, 10 * 39);
}

}  // namespace
}  // namespace narrows
