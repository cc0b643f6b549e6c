// A barrier is two counters: threads arrived, and barriers passed. The last to arrive changes the second, on
// which the others wait.
#include "base/thread_pool.h"

#include <chrono>
#include <exception>
#include <system_error>

namespace narrows {

namespace {

using Clock = std::chrono::steady_clock;

/// A wait inside a step: stages are balanced, so that it is short unless a thread has lost its core.
constexpr int64_t kBarrierSpinNs = 50'000;
/// A wait between two steps: sampling and printing a token.
constexpr int64_t kIdleSpinNs = 200'000;
/// Looks at the value between two looks at the clock.
constexpr int kLooks = 32;

}  // namespace

Result<std::unique_ptr<ThreadPool>> ThreadPool::create(int n_threads) {
  std::unique_ptr<ThreadPool> pool(new ThreadPool(n_threads));
  pool->threads_.reserve(static_cast<size_t>(n_threads));
  try {
    for (int i = 1; i < n_threads; ++i)
      pool->threads_.emplace_back([p = pool.get(), i] { p->work_until_stopped(i); });
  } catch (const std::system_error&) {
    return Status(StatusCode::out_of_memory, "the system gives no more threads; give a smaller --threads");
  }
  return pool;
}

void ThreadPool::pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  change(run_);
  for (std::thread& t : threads_) t.join();
}

void ThreadPool::run(Work* work, void* context) {
  work_ = work;
  context_ = context;
  change(run_);
  work(context, 0, n_threads_);
  barrier();
}

void ThreadPool::work_until_stopped(int ith) {
  for (uint32_t seen = 0;; ++seen) {
    wait_while(run_, seen, kIdleSpinNs);
    if (stop_) return;
    work_(context_, ith, n_threads_);
    barrier();
  }
}

void ThreadPool::barrier() {
  if (n_threads_ == 1) return;
  const uint32_t now = passed_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(n_threads_)) {
    arrived_.store(0, std::memory_order_relaxed);
    change(passed_);
  } else {
    wait_while(passed_, now, kBarrierSpinNs);
  }
}

namespace {

struct TaskList {
  int64_t n;
  const std::function<void(int64_t, int)>& task;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr thrown;  ///< the first; must not leave a thread of the pool

  void work(int ith) {
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) {
      try {
        task(i, ith);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!thrown) thrown = std::current_exception();
      }
    }
  }
};

}  // namespace

void ThreadPool::for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) {
  TaskList list{n, task, {}, {}, {}};
  if (n == 1) {
    list.work(0);
  } else if (n > 1) {
    run([](void* tasks, int ith, int /*n_threads*/) { static_cast<TaskList*>(tasks)->work(ith); }, &list);
  }
  if (list.thrown) std::rethrow_exception(list.thrown);
}

void ThreadPool::change(std::atomic<uint32_t>& value) {
  // Sequentially consistent, as the two in wait_while(): either this sees the sleeper or the sleeper the new
  // value.
  value.fetch_add(1);
  if (sleepers_.load() == 0) return;
  { const std::lock_guard<std::mutex> lock(mutex_); }  // who has looked at the value is asleep by now
  wake_.notify_all();
}

void ThreadPool::wait_while(const std::atomic<uint32_t>& value, uint32_t old, int64_t spin_ns) {
  Clock::time_point start{};
  for (int64_t round = 0;; ++round) {
    for (int i = 0; i < kLooks; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
    const Clock::time_point now = Clock::now();
    if (round == 0) start = now;
    if (std::chrono::nanoseconds(now - start).count() >= spin_ns) break;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleepers_;
  wake_.wait(lock, [&] { return value.load() != old; });
  --sleepers_;
}

}  // namespace narrows
