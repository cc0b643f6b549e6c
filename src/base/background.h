// Threads that do jobs behind their owner's back: what a prompt leaves to be done beside its next layer.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/workers.h"
#include "narrows/status.h"

namespace narrows {

/// Jobs are begun in the order in which they are given. As Workers for the jobs themselves: threads that have
/// no job help those that have.
class Background final : public Workers {
 public:
  /// out_of_memory: the system gives no more threads.
  static Result<std::unique_ptr<Background>> create(int n_threads);
  /// Waits for all jobs.
  ~Background() override;
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  /// A job throws nothing. May throw std::bad_alloc, then it is not done.
  void give(std::function<void()> job);
  /// Returns when all that was given is done; what it wrote is then visible. Not from within a job.
  void wait();

  int n_threads() const override { return static_cast<int>(threads_.size()); }
  /// From within a job.
  void for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) override;

 private:
  struct Loop;
  Background() = default;
  void work();
  static void take_tasks(Loop& loop, int ith);

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<std::function<void()>> jobs_;
  std::vector<Loop*> loops_;  ///< that others may help with
  int n_running_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace narrows
