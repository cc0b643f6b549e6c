// Threads that run one function together, step after step, with barriers inside: the runtime of a decode
// step, which is some hundred stages of 5 to 500 microseconds. A thread that waits spins first, because the
// others are nearly there, and then sleeps, so that it takes no core from them when there are fewer cores
// than threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/workers.h"
#include "narrows/status.h"

namespace narrows {

class ThreadPool final : public Workers {
 public:
  /// n_threads - 1 threads are started, the caller of run() is the first. out_of_memory: the system gives no
  /// more.
  static Result<std::unique_ptr<ThreadPool>> create(int n_threads);
  ~ThreadPool() override;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const override { return n_threads_; }

  /// For loops that wait for another thread of the pool.
  static void pause();

  /// What all threads run, thread ith of n_threads.
  using Work = void(void* context, int ith, int n_threads);
  /// Returns when all threads have returned from it; what they wrote is then visible. One caller at a time.
  void run(Work* work, void* context);
  /// Inside Work: no thread goes on before all have come here; what they wrote before is then visible to all.
  void barrier();

  /// Threads take the tasks one by one. Not inside Work.
  void for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) override;

 private:
  explicit ThreadPool(int n_threads) : n_threads_(n_threads) {}
  void work_until_stopped(int ith);
  void wait_while(const std::atomic<uint32_t>& value, uint32_t old, int64_t spin_ns);
  void change(std::atomic<uint32_t>& value);

  int n_threads_;
  std::vector<std::thread> threads_;
  Work* work_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;  ///< read after `run_` has changed
  // Each on a cache line of its own: they are written while others spin on the next.
  alignas(64) std::atomic<uint32_t> run_{0};      ///< changes when there is work
  alignas(64) std::atomic<uint32_t> passed_{0};   ///< changes when all have arrived
  alignas(64) std::atomic<uint32_t> arrived_{0};  ///< threads at the running barrier
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace narrows
