// The engine's thread: slots decode together, prompts are read in pieces between their steps, choices that
// wait get a slot when one is free and memory holds. Continuous batching, without HTTP or JSON.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "narrows/engine.h"
#include "server/job.h"
#include "server/metrics.h"
#include "server/prefix_store.h"
#include "server/slot.h"

namespace narrows::server {

struct SchedulerOptions {
  SessionOptions session;  ///< profile (the default of requests), context, threads, basis
  int n_slots = 4;
  int max_waiting = 64;      ///< choices without a slot
  int64_t memory_bytes = 0;  ///< most bytes of all caches; 0: four fifths of what is free at the start
  int64_t store_bytes = -1;  ///< most bytes of kept prefixes; -1: a quarter of memory_bytes
  /// Of the time while prompts are read, the part that steps of other slots may take; the rest is the
  /// prompt's.
  double decode_share = 1.0 / 3;
};

/// One slot as /slots shows it.
struct SlotInfo {
  int id = 0;
  SlotState state = SlotState::idle;
  std::string job_id;
  std::string kv;
  int64_t n_ctx = 0;
  int64_t n_tokens = 0;  ///< in its cache
  int64_t n_prompt = 0;
  int64_t n_generated = 0;
  double prefill_done = 0;
  CacheStats cache;
};

class Scheduler {
 public:
  static Result<std::unique_ptr<Scheduler>> create(std::shared_ptr<const Model> model,
                                                   const SchedulerOptions& options, Metrics* metrics);
  /// As stop() with no patience.
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// What would refuse the job: prompts that do not fit the context, more memory than the limit, too many
  /// that wait. Takes it if there is nothing: its channel then gets events until every choice is finished or
  /// has failed, or the job is cancelled. From any thread.
  std::optional<ApiError> submit(std::shared_ptr<Job> job);

  /// Takes the session out of an idle slot, to be saved or replaced by this thread; give it back with
  /// release(). Nothing: error says why. From any thread.
  std::optional<Held> hold(int slot, ApiError& error);
  void release(int slot, Held held) noexcept;

  /// Sets memory aside for the session that a slot which is held will get, and lets caches that nobody works
  /// with go for it. An error with both figures, and nothing happens, if what is at work leaves too little.
  std::optional<ApiError> reserve(int slot, int64_t bytes);

  /// As of the engine's last turn: these do not wait for it. What a client knows of (the end of its answer)
  /// is in them.
  std::vector<SlotInfo> slots() const;
  Gauges gauges() const;
  int64_t memory_limit() const { return memory_limit_; }
  const SchedulerOptions& options() const { return options_; }
  int64_t n_ctx() const { return n_ctx_; }

  /// Takes no more jobs, lets those that run finish for `patience`, then fails the rest, and ends the thread.
  void stop(std::chrono::milliseconds patience);

 private:
  /// A choice without a slot.
  struct Waiting {
    std::shared_ptr<Job> job;
    int choice;
  };

  Scheduler(std::shared_ptr<const Model> model, const SchedulerOptions& options, Metrics* metrics);

  // scheduler.cpp: the loop
  void run();
  void take_commands(bool may_wait);
  void drop_cancelled();
  bool read_prompts();
  void write_answers();
  void take_arrived();
  void take_returned() noexcept;
  void write_step();
  /// Runs on the engine thread, between two turns; waits for it. What it throws is thrown here.
  void on_engine(const std::function<void()>& work);
  int n_busy() const;

  // shown.cpp: what others see of the engine
  void show() noexcept;
  void show_slots() noexcept;
  void copy_slots();
  void show_if_old() noexcept;

  // placing.cpp: which choice gets which slot
  void place_waiting();
  enum class Placing { placed, later, no_memory };
  Placing place(const Waiting& waiting);
  /// The same without exceptions: what it throws fails the choice.
  Placing place_or_fail(const Waiting& waiting) noexcept;
  bool will_be_read(const Waiting& waiting, int64_t n_now) const;
  bool make_room(int64_t bytes);
  int64_t bytes_needed(const Job& job, int choice) const;
  Result<std::unique_ptr<Session>> fresh_session(const KvProfile& profile);
  std::optional<ApiError> refusal(const Job& job) const;

  // answering.cpp: what a slot does with its turn
  PromptRows rows_wanted(Slot& slot, const Waiting& waiting) const;
  Status begin(Slot& slot, const Waiting& waiting, int64_t n_cached);
  void prompt_is_read(Slot& slot);
  /// What a slot's turn drew.
  struct Drawn {
    Result<Token> token = Token{0};
    bool is_end = false;
    bool goes_on = true;  ///< no stop string
    Event event;          ///< what of it can be shown
    bool later = false;   ///< there is no token yet: see Slot::n_put_off
  };
  Drawn draw(Slot& slot, std::atomic<int64_t>* grammar_steps) const;
  void pass_on(Slot& slot, Drawn drawn);
  void finish(Slot& slot, const char* reason);
  /// The session stays as leave() keeps it, unless the failure may have left it in any state.
  void fail(Slot& slot, const Status& status) noexcept;
  void fail(const Waiting& waiting, const Status& status) noexcept;
  void fail(const Waiting& waiting, const ApiError& error);
  /// keeps: of a prompt that is still read, what its session can go back to; of an answer, all.
  void leave(Slot& slot, bool keeps) noexcept;
  /// As leave(), and the session is gone: whatever state it was left in.
  void abandon(Slot& slot) noexcept;
  void report_progress(Slot& slot);

  std::shared_ptr<const Model> model_;
  SchedulerOptions options_;
  Metrics* metrics_;
  int64_t n_ctx_ = 0;
  int64_t memory_limit_ = 0;
  std::unique_ptr<DecodeBatch> batch_;
  std::vector<Slot> slots_;
  PrefixStore store_;
  std::deque<Waiting> waiting_;
  double decode_credit_s_ = 0;  ///< time that steps may take before prompts have their turn again
  uint64_t turn_ = 0;
  Slot* target_ = nullptr;  ///< of place()

  std::mutex mutex_;  ///< of what follows
  std::condition_variable wake_;
  std::vector<std::shared_ptr<Job>> arrived_;
  std::vector<std::function<void()>> commands_;
  std::vector<std::optional<Held>> returned_;  ///< by slot: sessions that were given back
  int n_admitted_ = 0;                         ///< choices arrived, waiting or in a slot
  bool closed_ = false;
  std::optional<Clock::time_point> deadline_;  ///< when patience ends
  bool ended_ = false;

  mutable std::mutex shown_mutex_;  ///< of what follows; never held for longer than a copy takes
  std::vector<SlotInfo> shown_slots_;
  Gauges shown_gauges_;
  Clock::time_point shown_at_;
  int shown_busy_ = -1;

  std::thread thread_;
};

}  // namespace narrows::server
