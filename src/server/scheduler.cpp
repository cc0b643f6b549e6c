// The loop of the engine's thread.
#include "server/scheduler.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <future>

#include "base/guarded.h"
#include "base/memory_ledger.h"

namespace narrows::server {

namespace {

/// A turn of steps that came late may be made up for, but not more than this.
constexpr double kMostCredit_s = 0.1;
/// Of the grammars of all slots, in one step of the answers, but for one slot's: 0.05 to 0.25 s.
constexpr int64_t kGrammarStepsOfAStep = 50'000'000;

uint64_t microseconds(double s) { return static_cast<uint64_t>(s * 1e6); }

}  // namespace

Scheduler::Scheduler(std::shared_ptr<const Model> model, const SchedulerOptions& options, Metrics* metrics)
    : model_(std::move(model)),
      options_(options),
      metrics_(metrics),
      memory_limit_(options.memory_bytes > 0 ? options.memory_bytes
                                             : MemoryLedger::process().free_bytes() / 5 * 4),
      store_(options.store_bytes >= 0 ? options.store_bytes : memory_limit_ / 4) {
  options_.session.segments = true;
}

Result<std::unique_ptr<Scheduler>> Scheduler::create(std::shared_ptr<const Model> model,
                                                     const SchedulerOptions& options, Metrics* metrics) {
  std::unique_ptr<Scheduler> s(new Scheduler(std::move(model), options, metrics));
  Result<std::unique_ptr<DecodeBatch>> batch =
      DecodeBatch::create(s->model_, options.n_slots, options.session.n_threads);
  if (!batch.ok()) return batch.status();
  s->batch_ = std::move(*batch);
  for (int i = 0; i < options.n_slots; ++i) {
    s->slots_.emplace_back();
    s->slots_.back().id = i;
  }
  s->returned_.resize(s->slots_.size());
  // One session now: whatever is wrong with the options shows before the first request.
  Result<std::unique_ptr<Session>> first = s->fresh_session(options.session.kv);
  if (!first.ok()) return first.status();
  s->n_ctx_ = (*first)->n_ctx();
  s->slots_.front().held.session = std::move(*first);
  s->show();
  s->thread_ = std::thread([raw = s.get()] { raw->run(); });
  return s;
}

Scheduler::~Scheduler() { stop(std::chrono::milliseconds(0)); }

std::optional<ApiError> Scheduler::submit(std::shared_ptr<Job> job) {
  std::optional<ApiError> error = refusal(*job);
  if (!error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
      error = http_error(503, "the server is shutting down");
    } else if (n_admitted_ + job->n_choice() > options_.max_waiting + options_.n_slots) {
      error =
          http_error(429, fmt::format("{} requests are at work or wait already, there are {} slots and the "
                                      "queue holds {}; try again later",
                                      n_admitted_, options_.n_slots, options_.max_waiting));
    } else {
      n_admitted_ += job->n_choice();
      arrived_.push_back(std::move(job));
    }
  }
  ++(error ? metrics_->refused : metrics_->requests);
  wake_.notify_one();
  return error;
}

void Scheduler::on_engine(const std::function<void()>& work) {
  std::promise<void> done;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!ended_) {
      commands_.push_back([&] {
        try {
          work();
          show_slots();
          done.set_value();
        } catch (...) {
          done.set_exception(std::current_exception());
        }
      });
    } else {
      work();  // nobody else is there any more
      show_slots();
      done.set_value();
    }
  }
  wake_.notify_one();
  done.get_future().get();
}

void Scheduler::stop(std::chrono::milliseconds patience) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    deadline_ = Clock::now() + patience;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Scheduler::take_commands(bool may_wait) {
  std::vector<std::function<void()>> commands;
  if (may_wait) show();
  {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto news = [this] {
      return closed_ || !arrived_.empty() || !commands_.empty() ||
             std::any_of(returned_.begin(), returned_.end(), [](const auto& r) { return r.has_value(); });
    };
    // What waits while no slot works waits for a session that is being saved.
    if (may_wait && waiting_.empty()) wake_.wait(lock, news);
    if (may_wait && !waiting_.empty()) wake_.wait_for(lock, std::chrono::milliseconds(10), news);
    take_returned();
    take_arrived();
    commands.swap(commands_);
  }
  for (const auto& command : commands) command();
}

/// Under the lock.
void Scheduler::take_arrived() {
  for (const std::shared_ptr<Job>& job : arrived_) {
    const Status s = guarded("another request", [&] {
      for (int c = 0; c < job->n_choice(); ++c) waiting_.push_back({job, c});
    });
    if (s.ok()) continue;
    std::erase_if(waiting_, [&](const Waiting& w) { return w.job == job; });
    job->channel.break_off();
  }
  arrived_.clear();
}

/// Under the lock.
void Scheduler::take_returned() noexcept {
  for (Slot& slot : slots_) {
    std::optional<Held>& held = returned_[static_cast<size_t>(slot.id)];
    if (!held) continue;
    slot.held = std::move(*held);
    held.reset();
    slot.state = SlotState::idle;
    slot.reserved_bytes = 0;
    slot.last_used = Clock::now();
  }
}

void Scheduler::drop_cancelled() {
  std::erase_if(waiting_, [](const Waiting& w) { return w.job->channel.cancelled(); });
  for (Slot& slot : slots_) {
    if (!slot.busy() || !slot.job->channel.cancelled()) continue;
    ++metrics_->cancelled;
    leave(slot, true);
  }
}

int Scheduler::n_busy() const {
  return static_cast<int>(
      std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.busy(); }));
}

void Scheduler::run() {
  while (true) {
    const auto busy = [this] { return n_busy() > 0; };
    take_commands(!busy());
    drop_cancelled();
    place_waiting();
    show_if_old();
    bool over = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      over = closed_ && (Clock::now() >= *deadline_ || (!busy() && waiting_.empty() && arrived_.empty()));
    }
    if (over) break;
    const bool reading = read_prompts();
    if (!reading || decode_credit_s_ > 0) write_answers();
  }

  const auto fail_at_end = [this](const Waiting& w) {
    const Status s =
        guarded("the last event", [&] { fail(w, http_error(503, "the server is shutting down")); });
    if (!s.ok()) w.job->channel.break_off();
  };
  for (Slot& slot : slots_) {
    if (!slot.busy()) continue;
    fail_at_end({slot.job, slot.choice});
    leave(slot, false);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  take_returned();
  take_arrived();
  for (const Waiting& w : waiting_) fail_at_end(w);
  waiting_.clear();
  for (const auto& command : commands_) command();
  commands_.clear();
  ended_ = true;
}

/// A piece of one prompt: in turn the one that came first and the one that has least left, so that a short
/// prompt need not wait for a long one, nor a long one for any number of short ones.
bool Scheduler::read_prompts() {
  Slot* oldest = nullptr;
  Slot* shortest = nullptr;
  const auto left = [](const Slot& s) {
    return (1 - s.held.session->prefill_done()) * static_cast<double>(s.result.n_prompt - s.result.n_cached);
  };
  for (Slot& slot : slots_) {
    if (slot.state != SlotState::reading) continue;
    if (oldest == nullptr || slot.job->arrived < oldest->job->arrived) oldest = &slot;
    if (shortest == nullptr || left(slot) < left(*shortest)) shortest = &slot;
  }
  if (oldest == nullptr) {
    decode_credit_s_ = 0;
    return false;
  }
  Slot& slot = ++turn_ % 2 == 0 ? *oldest : *shortest;
  const auto begin = Clock::now();
  // A part of the prompt, and what comes of it.
  const Status status = guarded("the prompt", [&]() -> Status {
    if (Status s = slot.held.session->prefill_step(); !s.ok()) return s;
    if (slot.held.session->prefill_done() == 1) {
      prompt_is_read(slot);
    } else {
      report_progress(slot);
    }
    return {};
  });
  const double seconds = seconds_since(begin);
  metrics_->prefill_us += microseconds(seconds);
  decode_credit_s_ = std::min(
      kMostCredit_s, decode_credit_s_ + seconds * options_.decode_share / (1 - options_.decode_share));
  if (!status.ok()) fail(slot, status);
  return true;
}

/// A step of all slots that write.
void Scheduler::write_answers() {
  const Status status = guarded("a step of the answers", [this] { write_step(); });
  if (status.ok()) return;
  for (Slot& slot : slots_) {
    if (slot.state == SlotState::writing) fail(slot, status);
  }
}

void Scheduler::write_step() {
  std::vector<Slot*> writing;  // first those with a token to decode
  std::vector<Session*> sessions;
  std::vector<Token> tokens;
  for (Slot& slot : slots_) {
    if (slot.state != SlotState::writing || slot.n_put_off > 0) continue;
    writing.push_back(&slot);
    sessions.push_back(slot.held.session.get());
    tokens.push_back(slot.next);
  }
  const Slot* longest = nullptr;  // that was put off
  for (Slot& slot : slots_) {
    if (slot.state != SlotState::writing || slot.n_put_off == 0) continue;
    writing.push_back(&slot);
    if (longest == nullptr || slot.n_put_off > longest->n_put_off) longest = &slot;
  }
  if (writing.empty()) return;
  const auto begin = Clock::now();
  std::vector<Status> each(sessions.size());
  if (!sessions.empty()) {
    // A failure of the whole step is in each of them too.
    const Status status = batch_->decode(sessions, tokens, each);
    for (Status& s : each) {
      if (s.ok()) s = status;
    }
  }
  each.resize(writing.size());
  // To draw from a large vocabulary takes a good part of a step, and a grammar may take half a second: those
  // of all slots share what one may take, but for the slot that has waited longest, so that each gets on.
  std::atomic<int64_t> grammar_steps{kGrammarStepsOfAStep};
  std::vector<Drawn> drawn(writing.size());
  batch_->for_each(static_cast<int64_t>(writing.size()), [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    std::atomic<int64_t>* const steps = writing[at] == longest ? nullptr : &grammar_steps;
    if (each[at].ok()) each[at] = guarded("a token", [&] { drawn[at] = draw(*writing[at], steps); });
  });
  for (size_t i = 0; i < writing.size(); ++i) {
    Slot& slot = *writing[i];
    if (each[i].ok()) {
      each[i] = guarded("a token", [&] {
        if (i < tokens.size()) slot.held.tokens.push_back(tokens[i]);
        pass_on(slot, std::move(drawn[i]));
      });
    }
    if (!each[i].ok()) fail(slot, each[i]);
  }
  const double seconds = seconds_since(begin);
  ++metrics_->decode_steps;
  metrics_->decode_us += microseconds(seconds);
  decode_credit_s_ -= seconds;
}

std::optional<Held> Scheduler::hold(int id, ApiError& error) {
  std::optional<Held> held;
  on_engine([&] {
    if (id < 0 || id >= options_.n_slots) {
      error = http_error(
          404, fmt::format("there is no slot {}, the server has 0 to {}", id, options_.n_slots - 1));
      return;
    }
    Slot& slot = slots_[static_cast<size_t>(id)];
    if (slot.state != SlotState::idle) {
      error = http_error(409, fmt::format("slot {} is at work; try again when it is idle", id));
      return;
    }
    slot.state = SlotState::held;
    held = std::move(slot.held);
    slot.held = {};
    slot.reserved_bytes = held->session != nullptr ? held->session->cache_stats().bytes : 0;
  });
  return held;
}

void Scheduler::release(int id, Held held) noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    returned_[static_cast<size_t>(id)] = std::move(held);
    if (ended_) take_returned();
  }
  wake_.notify_one();
  // The engine takes it before the next command; without memory for one it takes it all the same.
  (void)guarded("the slot", [this] { on_engine([] {}); });
}

}  // namespace narrows::server
