// Threads that answer requests: made as they are needed, up to a bound, and kept.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace narrows::server {

class HandlerPool {
 public:
  /// At most n_threads at work, and max_waiting jobs that wait for one of them.
  HandlerPool(size_t n_threads, size_t max_waiting) : n_threads_(n_threads), max_waiting_(max_waiting) {}
  /// Waits for all jobs.
  ~HandlerPool();
  HandlerPool(const HandlerPool&) = delete;
  HandlerPool& operator=(const HandlerPool&) = delete;

  /// False: as many are at work and wait as may, or no thread could be made. The job must not throw.
  bool run(std::function<void()> job);

 private:
  void work();

  const size_t n_threads_;
  const size_t max_waiting_;
  std::mutex mutex_;  ///< of what follows
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  std::vector<std::thread> threads_;
  size_t n_idle_ = 0;
  bool ended_ = false;
};

}  // namespace narrows::server
