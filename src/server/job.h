// One request on its way: what goes from the HTTP thread to the engine thread, and the events that come back.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "narrows/engine.h"
#include "server/api_error.h"
#include "server/request.h"

namespace narrows::server {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// A token with the log of its probability, as the model gave it: before biases, penalties and temperature.
struct TokenLogprob {
  struct Alternative {
    std::string piece;  ///< bytes, maybe a part of a character
    double logprob = 0;
  };
  std::string piece;
  double logprob = 0;
  std::vector<Alternative> top;
  bool is_first = false;  ///< of a prompt: nothing comes before it, so it has no probability
};

/// How the hidden states of a text become one vector.
enum class Pooling { mean, last };

/// Counts and times of one choice.
struct ChoiceResult {
  int slot = -1;
  const char* finish_reason = "stop";  ///< "stop" or "length"
  std::string stop;                    ///< the stop string that ended it; "": none did
  int64_t n_prompt = 0;
  int64_t n_cached = 0;     ///< tokens of the prompt that were not computed again
  int64_t n_generated = 0;  ///< the token that ends the answer not counted
  double queue_s = 0;
  double prefill_s = 0;  ///< from the first piece of the prompt to its logits, others' turns included
  double decode_s = 0;   ///< from there to the end, others' turns included
  std::string kv;
  int64_t budget = 0;  ///< tokens read of the compressed ones at the end; -2: all
  int64_t n_read = 0;  ///< tokens that the last step attended to
  CacheStats cache;
  std::vector<float> embedding;  ///< [n_embd], of length 1; where a job asks for it
};

struct Event {
  enum class Kind { progress, text, finished, failed };
  Kind kind = Kind::text;
  int choice = 0;
  // progress
  int64_t n_prompt = 0;
  int64_t n_cached = 0;
  double done = 0;  ///< of the tokens that are not cached, in [0, 1]
  double seconds = 0;
  // text
  std::string text;  ///< whole characters
  std::vector<TokenLogprob> logprobs;
  // finished, failed
  ChoiceResult result;
  ApiError error;
};

/// Events of a job, from the engine thread to one reader.
class Channel {
 public:
  /// Most bytes of events that a reader may be behind: the job of one that does not read is cancelled, and
  /// fails.
  static constexpr size_t kMostBytes = size_t{8} << 20;

  void push(Event event);
  /// For when there is no memory for an event: pop() then gives the reader a failure, after what is there.
  void break_off() noexcept;
  /// The next event, or nothing after `wait`.
  std::optional<Event> pop(std::chrono::milliseconds wait);

  /// The reader has gone: the engine stops the job at its next turn.
  void cancel() { cancelled_ = true; }
  bool cancelled() const { return cancelled_; }

 private:
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Event> events_;
  bool broken_off_ = false;
  size_t n_bytes_ = 0;
  bool overflown_ = false;
  std::atomic<bool> cancelled_{false};
};

/// A request with its prompts as tokens. Choice c answers prompt c / n.
struct Job {
  std::string id;
  GenerationRequest request;
  std::shared_ptr<const AnswerFormat> format;  ///< null: all of an answer is its content
  KvProfile profile;
  std::optional<Pooling> embeds;  ///< a vector of each prompt is wanted, and no answer
  std::vector<std::vector<Token>> prompts;
  Clock::time_point arrived = Clock::now();
  Channel channel;

  int n_choice() const { return static_cast<int>(prompts.size()) * request.n; }
  const std::vector<Token>& prompt_of(int choice) const {
    return prompts[static_cast<size_t>(choice / request.n)];
  }
};

}  // namespace narrows::server
