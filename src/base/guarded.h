// Borders where exceptions end: on threads that nobody waits for with a catch, in callbacks of C code, in
// parallel regions. What passes one becomes the Status of the session or request that it belongs to.
#pragma once

#include <atomic>
#include <mutex>
#include <type_traits>
#include <utility>

#include "narrows/status.h"

namespace narrows {

/// The exception being handled as a Status: out_of_memory for bad_alloc, else internal. `what` was going on.
/// Does not throw: without memory even for the sentence, the message is a short one.
Status status_of_exception(const char* what) noexcept;

/// fn(), or what its exception comes to.
template <class Fn>
Status guarded(const char* what, Fn&& fn) noexcept {
  try {
    if constexpr (std::is_void_v<std::invoke_result_t<Fn>>) {
      std::forward<Fn>(fn)();
      return {};
    } else {
      return std::forward<Fn>(fn)();
    }
  } catch (...) {
    return status_of_exception(what);
  }
}

/// The first error of tasks that run side by side.
class FirstError {
 public:
  /// Runs fn() unless there is an error already.
  template <class Fn>
  void run(const char* what, Fn&& fn) noexcept {
    if (failed_.load(std::memory_order_relaxed)) return;
    Status s = guarded(what, std::forward<Fn>(fn));
    if (!s.ok()) set(std::move(s));
  }
  void set(Status s) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (first_.ok()) first_ = std::move(s);
    failed_ = true;
  }
  /// Once all tasks have ended. ok if none has failed; forgets it.
  Status take() noexcept {
    failed_ = false;
    return std::exchange(first_, Status());
  }

 private:
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  Status first_;
};

}  // namespace narrows
