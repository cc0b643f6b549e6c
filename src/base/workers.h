// Threads lent to code that has independent work but owns no threads: whoever runs a prompt or a step has
// them.
#pragma once

#include <cstdint>
#include <functional>

namespace narrows {

class Workers {
 public:
  virtual ~Workers() = default;
  virtual int n_threads() const = 0;
  /// Calls task(i) for each i < n, in any order and on any thread; returns when all are done. An exception of
  /// a task is thrown again here, after the others. Not from within a task.
  void for_each(int64_t n, const std::function<void(int64_t)>& task) {
    for_each_thread(n, [&](int64_t i, int /*ith*/) { task(i); });
  }
  /// The same for tasks that work in what belongs to a thread: task(i, ith), 0 <= ith < n_threads().
  virtual void for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) = 0;
};

/// The same on this thread if there are no workers.
inline void for_each(Workers* workers, int64_t n, const std::function<void(int64_t)>& task) {
  if (workers != nullptr && n > 1) {
    workers->for_each(n, task);
  } else {
    for (int64_t i = 0; i < n; ++i) task(i);
  }
}

}  // namespace narrows
