#include "server/handler_pool.h"

#include <system_error>

namespace narrows::server {

HandlerPool::~HandlerPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
  }
  wake_.notify_all();
  for (std::thread& t : threads_) t.join();
}

bool HandlerPool::run(std::function<void()> job) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool needs_thread = n_idle_ <= jobs_.size();
    if (needs_thread && threads_.size() < n_threads_) {
      try {
        threads_.emplace_back([this] { work(); });
      } catch (const std::system_error&) {
        // The system gives no more threads: the job waits for one of those that are there.
        if (threads_.empty()) return false;
      }
    } else if (needs_thread && jobs_.size() - n_idle_ >= max_waiting_) {
      return false;
    }
    jobs_.push_back(std::move(job));
  }
  wake_.notify_one();
  return true;
}

void HandlerPool::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    ++n_idle_;
    wake_.wait(lock, [this] { return ended_ || !jobs_.empty(); });
    --n_idle_;
    if (jobs_.empty()) return;
    const std::function<void()> job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    job();
    lock.lock();
  }
}

}  // namespace narrows::server
