#include "engine/executor_pool.h"

#include <algorithm>

#include "exec/cpu/cpu_executor.h"
#include "exec/cuda/cuda_executor.h"

namespace narrows {

Result<std::unique_ptr<Executor>> ExecutorPool::take(int n_threads) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The one that was given back last: its threads are awake, and those of others would wait for work, on
    // cores that this one needs, at each turn.
    const auto found = std::find_if(idle_.rbegin(), idle_.rend(),
                                    [&](const auto& e) { return e->n_threads() == n_threads; });
    if (found != idle_.rend()) {
      std::unique_ptr<Executor> taken = std::move(*found);
      idle_.erase(std::next(found).base());
      return taken;
    }
  }
  if (on_device_ != nullptr) {
    Result<std::unique_ptr<CudaExecutor>> made = CudaExecutor::create(spec_, plan_, *on_device_, n_threads);
    if (!made.ok()) return made.status();
    return std::unique_ptr<Executor>(std::move(*made));
  }
  Result<std::unique_ptr<CpuExecutor>> made = CpuExecutor::create(spec_, plan_, n_threads);
  if (!made.ok()) return made.status();
  return std::unique_ptr<Executor>(std::move(*made));
}

void ExecutorPool::give_back(std::unique_ptr<Executor> executor) noexcept {
  executor->shrink();
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(executor));
  } catch (const std::bad_alloc&) {
    executor.reset();  // the next one makes its own
  }
}

Result<ExecutorLease> ExecutorLease::take(ExecutorPool& pool, int n_threads) {
  Result<std::unique_ptr<Executor>> taken = pool.take(n_threads);
  if (!taken.ok()) return taken.status();
  ExecutorLease lease;
  lease.pool_ = &pool;
  lease.executor_ = std::move(*taken);
  return lease;
}

ExecutorLease& ExecutorLease::operator=(ExecutorLease&& other) noexcept {
  give_back();
  pool_ = other.pool_;
  executor_ = std::move(other.executor_);
  return *this;
}

void LentWorkers::for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) {
  if (n > 1 && lent_ != nullptr) return lent_->for_each_thread(n, task);
  if (n > 1) {
    Result<ExecutorLease> lease = ExecutorLease::take(pool_, n_threads_);
    if (lease.ok()) return (*lease)->for_each_thread(n, task);
  }
  for (int64_t i = 0; i < n; ++i) task(i, 0);
}

}  // namespace narrows
