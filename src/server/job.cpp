#include "server/job.h"

namespace narrows::server {

void Channel::push(Event event) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    events_.push_back(std::move(event));
  }
  ready_.notify_one();
}

void Channel::break_off() noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    broken_off_ = true;
  }
  ready_.notify_one();
}

std::optional<Event> Channel::pop(std::chrono::milliseconds wait) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!ready_.wait_for(lock, wait, [this] { return !events_.empty() || broken_off_; })) return std::nullopt;
  if (events_.empty()) {
    Event failed;
    failed.kind = Event::Kind::failed;
    failed.error = to_api_error({StatusCode::out_of_memory, "no memory for the rest of the answer"});
    return failed;
  }
  Event event = std::move(events_.front());
  events_.pop_front();
  return event;
}

}  // namespace narrows::server
