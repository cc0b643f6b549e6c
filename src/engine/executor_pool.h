// The executors of a model: who needs one takes it for as long as it computes and gives it back, so that
// there are as many, each with its threads, as ever work at a time.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "exec/cuda/cuda_weights.h"
#include "exec/executor.h"
#include "narrows/status.h"

namespace narrows {

class ExecutorPool {
 public:
  /// All outlive it.
  ExecutorPool(const ModelSpec& spec, const Plan& plan) : spec_(spec), plan_(plan) {}
  /// The weights on a GPU, whose executors these are then; before any is taken. They outlive it.
  void use(const CudaWeights* on_device) { on_device_ = on_device; }

  /// One that is idle, or a new one. out_of_memory: the system gives no more threads.
  Result<std::unique_ptr<Executor>> take(int n_threads);
  /// May be null. Does not throw.
  void give_back(std::unique_ptr<Executor> executor) noexcept;

 private:
  const ModelSpec& spec_;
  const Plan& plan_;
  const CudaWeights* on_device_ = nullptr;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Executor>> idle_;
};

/// An executor on loan. The pool outlives it.
class ExecutorLease {
 public:
  ExecutorLease() = default;
  static Result<ExecutorLease> take(ExecutorPool& pool, int n_threads);
  ExecutorLease(ExecutorLease&& other) noexcept = default;
  ExecutorLease& operator=(ExecutorLease&& other) noexcept;
  ~ExecutorLease() { give_back(); }
  void give_back() noexcept {
    if (executor_ != nullptr) pool_->give_back(std::move(executor_));
  }

  explicit operator bool() const { return executor_ != nullptr; }
  Executor& operator*() const { return *executor_; }
  Executor* operator->() const { return executor_.get(); }

 private:
  ExecutorPool* pool_ = nullptr;
  std::unique_ptr<Executor> executor_;
};

/// Threads for what comes between: those of the executor that is about, or of one taken for the while.
class LentWorkers final : public Workers {
 public:
  LentWorkers(ExecutorPool& pool, int n_threads) : pool_(pool), n_threads_(n_threads) {}
  int n_threads() const override { return n_threads_; }
  /// Of n_threads, until the next call; null: none is about. It outlives that.
  void lend(Executor* executor) { lent_ = executor; }
  /// For as long as it lives.
  class While {
   public:
    While(LentWorkers& workers, Executor& executor) : workers_(workers), before_(workers.lent_) {
      workers.lend(&executor);
    }
    ~While() { workers_.lend(before_); }
    While(const While&) = delete;
    While& operator=(const While&) = delete;

   private:
    LentWorkers& workers_;
    Executor* before_;
  };
  /// On this thread alone if the system gives no others.
  void for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) override;

 private:
  ExecutorPool& pool_;
  int n_threads_;
  Executor* lent_ = nullptr;
};

}  // namespace narrows
