#include "server/job.h"

namespace narrows::server {

namespace {

/// About what it takes.
size_t bytes_of(const Event& event) {
  size_t n = sizeof(Event) + event.text.size();
  for (const TokenLogprob& l : event.logprobs)
    n += sizeof(l) + l.piece.size() + l.top.size() * (sizeof(TokenLogprob::Alternative) + 16);
  return n;
}

}  // namespace

void Channel::push(Event event) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (overflown_) return;
    n_bytes_ += bytes_of(event);
    if (n_bytes_ > kMostBytes) {
      overflown_ = true;
      cancelled_ = true;
      event = {};
      event.kind = Event::Kind::failed;
      event.error = http_error(408, "the answer was not read in time");
      n_bytes_ += bytes_of(event);
    }
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
  n_bytes_ -= bytes_of(event);
  return event;
}

}  // namespace narrows::server
