// The threads of a decode step: all run, barriers hold, what was written before a barrier is seen behind it,
// however many threads share a core; what ThreadSanitizer runs.
#include "base/thread_pool.h"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <numeric>

namespace narrows {
namespace {

std::unique_ptr<ThreadPool> make(int n) {
  auto pool = ThreadPool::create(n);
  EXPECT_TRUE(pool.ok());
  return std::move(*pool);
}

void run(ThreadPool& pool, const std::function<void(int, int)>& work) {
  pool.run([](void* f, int ith, int n) { (*static_cast<const std::function<void(int, int)>*>(f))(ith, n); },
           const_cast<std::function<void(int, int)>*>(&work));
}

TEST(ThreadPool, EveryThreadRunsOnceARun) {
  for (const int n : {1, 2, 3, 7}) {
    const auto pool = make(n);
    std::vector<int> runs(static_cast<size_t>(n));
    for (int i = 0; i < 200; ++i) {
      run(*pool, [&](int ith, int n_threads) {
        EXPECT_EQ(n_threads, n);
        ++runs[static_cast<size_t>(ith)];
      });
    }
    EXPECT_EQ(runs, std::vector<int>(static_cast<size_t>(n), 200));
  }
}

// A running sum over a ring: each stage reads what the neighbour wrote in the stage before.
TEST(ThreadPool, ABarrierPublishesWhatWasWritten) {
  for (const int n : {2, 3, 5}) {
    const auto pool = make(n);
    std::vector<int64_t> a(static_cast<size_t>(n), 1), b(static_cast<size_t>(n));
    constexpr int kStages = 2000;
    run(*pool, [&](int ith, int n_threads) {
      const auto me = static_cast<size_t>(ith), next = static_cast<size_t>((ith + 1) % n_threads);
      for (int s = 0; s < kStages; s += 2) {
        b[me] = a[next] + 1;
        pool->barrier();
        a[me] = b[next] + 1;
        pool->barrier();
      }
    });
    EXPECT_EQ(a, std::vector<int64_t>(static_cast<size_t>(n), 1 + kStages));
  }
}

// Waits longer than anybody spins: sleepers are woken, at barriers and between runs.
TEST(ThreadPool, SleepersWake) {
  const auto pool = make(3);
  std::atomic<int> passed{0};
  for (int i = 0; i < 20; ++i) {
    run(*pool, [&](int ith, int) {
      for (int slow = 0; slow < 3; ++slow) {
        if (ith == slow) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        pool->barrier();
        ++passed;
      }
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  EXPECT_EQ(passed, 20 * 3 * 3);
}

TEST(ThreadPool, PoolsDoNotDisturbEachOther) {
  std::vector<std::thread> callers;
  std::vector<int64_t> sums(3);
  for (int64_t& sum : sums) {
    callers.emplace_back([&sum] {
      const auto pool = make(2);
      std::vector<int64_t> parts(2);
      for (int i = 0; i < 300; ++i) {
        run(*pool, [&](int ith, int) {
          parts[static_cast<size_t>(ith)] += i;
          pool->barrier();
          if (ith == 0) sum = std::accumulate(parts.begin(), parts.end(), int64_t{0});
        });
      }
    });
  }
  for (std::thread& t : callers) t.join();
  for (const int64_t sum : sums) EXPECT_EQ(sum, 2 * 299 * 300 / 2);
}

TEST(ThreadPool, UnusedOnesEnd) {
  for (int i = 0; i < 50; ++i) make(4);
}

}  // namespace
}  // namespace narrows
