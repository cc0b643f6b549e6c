// What others see of the engine: a copy that it makes between its turns, so that nobody who only looks waits
// for a turn to end.
#include "base/guarded.h"
#include "server/scheduler.h"

namespace narrows::server {

namespace {

/// A step of a small model takes about as long.
constexpr double kOld_s = 0.005;

}  // namespace

/// Without memory for a copy the last one stays.
void Scheduler::show_slots() noexcept {
  (void)guarded("the view of the slots", [this] { copy_slots(); });
}

void Scheduler::copy_slots() {
  std::vector<SlotInfo> all;
  all.reserve(slots_.size());
  Gauges g;
  g.n_slots = options_.n_slots;
  g.n_waiting = static_cast<int64_t>(waiting_.size());
  g.memory_limit = memory_limit_;
  g.store_bytes = store_.bytes();
  g.n_stored = store_.size();
  g.cache_bytes = g.store_bytes;
  for (const Slot& slot : slots_) {
    SlotInfo info;
    info.id = slot.id;
    info.state = slot.state;
    info.n_ctx = n_ctx_;
    info.kv = options_.session.kv.name;
    if (slot.held.session != nullptr) {
      info.kv = slot.held.session->profile().name;
      info.n_tokens = slot.held.session->n_past();
      info.prefill_done = slot.held.session->prefill_done();
      info.cache = slot.held.session->cache_stats();
      g.cache_bytes += info.cache.bytes;
      g.cache_bytes_f16 += info.cache.bytes_f16;
    }
    if (slot.busy()) {
      info.job_id = slot.job->id;
      info.n_prompt = slot.result.n_prompt;
      info.n_generated = slot.result.n_generated;
    }
    if (slot.state != SlotState::idle) ++g.n_busy;
    all.push_back(std::move(info));
  }
  const std::lock_guard<std::mutex> lock(shown_mutex_);
  shown_slots_.swap(all);
  shown_gauges_ = g;
}

/// The same, and room in the queue for choices that have ended.
void Scheduler::show() noexcept {
  show_slots();
  shown_busy_ = n_busy();
  shown_at_ = Clock::now();
  const std::lock_guard<std::mutex> lock(mutex_);
  n_admitted_ = shown_busy_ + static_cast<int>(waiting_.size());
  for (const auto& job : arrived_) n_admitted_ += job->n_choice();
}

void Scheduler::show_if_old() noexcept {
  if (n_busy() != shown_busy_ || seconds_since(shown_at_) > kOld_s) show();
}

std::vector<SlotInfo> Scheduler::slots() const {
  const std::lock_guard<std::mutex> lock(shown_mutex_);
  return shown_slots_;
}

Gauges Scheduler::gauges() const {
  const std::lock_guard<std::mutex> lock(shown_mutex_);
  return shown_gauges_;
}

}  // namespace narrows::server
