#include "base/background.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>

namespace narrows {

/// A loop of a job; all but `next` under the mutex.
struct Background::Loop {
  int64_t n;
  const std::function<void(int64_t, int)>& task;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex = {};
  std::exception_ptr error = {};
  int n_joined = 1;  ///< threads that ever took part
  int n_helping = 0;
};

Result<std::unique_ptr<Background>> Background::create(int n_threads) {
  std::unique_ptr<Background> made(new Background());
  try {
    for (int i = 0; i < n_threads; ++i) made->threads_.emplace_back([p = made.get()] { p->work(); });
  } catch (const std::system_error&) {
    return Status(StatusCode::out_of_memory, "the system gives no more threads; give a smaller --threads");
  }
  return made;
}

Background::~Background() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& t : threads_) t.join();
}

void Background::give(std::function<void()> job) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  wake_.notify_one();
}

void Background::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return jobs_.empty() && n_running_ == 0; });
}

void Background::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    Loop* help = nullptr;
    wake_.wait(lock, [&] {
      const auto open =
          std::find_if(loops_.begin(), loops_.end(), [](const Loop* l) { return l->next.load() < l->n; });
      help = open != loops_.end() ? *open : nullptr;
      return stop_ || !jobs_.empty() || help != nullptr;
    });
    if (help != nullptr) {  // what has begun comes before what has not
      const int ith = help->n_joined++;
      ++help->n_helping;
      lock.unlock();
      take_tasks(*help, ith);
      lock.lock();
      --help->n_helping;
      done_.notify_all();
    } else if (!jobs_.empty()) {
      const std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      ++n_running_;
      lock.unlock();
      job();
      lock.lock();
      --n_running_;
      done_.notify_all();
    } else {
      return;
    }
  }
}

void Background::take_tasks(Loop& loop, int ith) {
  for (int64_t i = loop.next++; i < loop.n; i = loop.next++) {
    try {
      loop.task(i, ith);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(loop.error_mutex);
      if (loop.error == nullptr) loop.error = std::current_exception();
    }
  }
}

void Background::for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) {
  Loop loop{n, task};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    loops_.push_back(&loop);
  }
  wake_.notify_all();
  take_tasks(loop, 0);
  {
    std::unique_lock<std::mutex> lock(mutex_);
    std::erase(loops_, &loop);
    done_.wait(lock, [&] { return loop.n_helping == 0; });
  }
  if (loop.error != nullptr) std::rethrow_exception(loop.error);
}

}  // namespace narrows
