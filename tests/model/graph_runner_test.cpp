// GraphRunner as Workers: every task once, on whatever thread; exceptions come back to the caller.
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

#include "model/graph.h"

namespace narrows {
namespace {

TEST(GraphRunnerTasks, EveryTaskRunsOnce) {
  for (const int n_threads : {1, 2, 5}) {
    GraphRunner runner(n_threads);
    for (const int64_t n : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(n));
      runner.for_each(n, [&](int64_t i) { ++calls[static_cast<size_t>(i)]; });
      for (const auto& c : calls) EXPECT_EQ(c, 1) << n_threads << " threads, " << n << " tasks";
    }
  }
}

TEST(GraphRunnerTasks, AnExceptionComesBackAfterTheOthersHaveRun) {
  GraphRunner runner(2);
  std::atomic<int> done{0};
  const auto task = [&](int64_t i) {
    if (i == 3) throw std::runtime_error("task 3");
    ++done;
  };
  EXPECT_THROW(runner.for_each(20, task), std::runtime_error);
  EXPECT_EQ(done, 19);
  runner.for_each(5, [&](int64_t) { ++done; });  // and it goes on
  EXPECT_EQ(done, 24);
}

}  // namespace
}  // namespace narrows
