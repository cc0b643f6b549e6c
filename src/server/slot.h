// A slot: one session and the choice that it works on. Only the engine thread touches it.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "narrows/engine.h"
#include "narrows/sampling.h"
#include "narrows/text.h"
#include "server/job.h"
#include "server/stop_strings.h"

namespace narrows::server {

/// A session and the tokens in its cache.
struct Held {
  std::unique_ptr<Session> session;
  std::vector<Token> tokens;

  /// Tokens that it could give to this prompt of the profile; 0: none.
  int64_t usable(std::span<const Token> prompt, const KvProfile& profile) const;
};

/// Length of the common beginning.
int64_t common_prefix(std::span<const Token> a, std::span<const Token> b);

/// The token's part of the distribution that the logits mean, with the n_top likeliest tokens beside it.
TokenLogprob logprob_of(const Tokenizer& tokenizer, Token token, std::span<const float> logits, int n_top);

/// Turns the tokens of one choice into the text that is shown, and knows when it ends.
class Writer {
 public:
  Writer(const Tokenizer& tokenizer, const Job& job);

  /// The token was drawn from these logits. What can be shown now, if anything. True while more may come.
  bool add(Token token, std::span<const float> logits, Event& event);
  /// The rest, when no token will come any more.
  void flush(Event& event);

  bool stopped() const { return stops_.stopped(); }
  const std::string& stop() const { return stops_.found(); }

 private:
  bool is_shown(Token token) const;
  void show(std::string text, Event& event);

  const Tokenizer& tokenizer_;
  const Job& job_;
  std::optional<int> n_logprobs_;
  Utf8Stream characters_;
  StopStrings stops_;
  /// Logprobs of tokens that have not been shown to their end, with the byte of the text where they begin.
  struct Waiting {
    size_t begin;
    TokenLogprob logprob;
  };
  std::vector<Waiting> waiting_;
  size_t n_read_ = 0;   ///< bytes of all pieces
  size_t n_shown_ = 0;  ///< bytes shown
};

enum class SlotState {
  idle,
  held,     ///< its session is with an HTTP thread, being saved or restored
  reading,  ///< the prompt
  writing,  ///< the answer
};

struct Slot {
  int id = 0;
  SlotState state = SlotState::idle;
  Held held;
  Clock::time_point last_used = Clock::now();

  // While reading or writing.
  std::shared_ptr<Job> job;
  int choice = 0;
  ChoiceResult result;
  std::unique_ptr<Sampler> sampler;
  std::unique_ptr<Writer> writer;
  std::vector<double> pooled;                 ///< Job::embeds: sum of hidden states, or the last one
  std::vector<TokenLogprob> prompt_logprobs;  ///< of a prompt that is echoed with them
  Token next = 0;                             ///< writing: drawn, not yet decoded
  int n_put_off = 0;  ///< writing: steps since the last token was decoded, in which none could be drawn
  int64_t reserved_bytes = 0;  ///< what its cache may come to
  Clock::time_point begun;     ///< of reading, then of writing
  Clock::time_point last_progress;

  bool busy() const { return state == SlotState::reading || state == SlotState::writing; }
  const std::vector<Token>& prompt() const { return job->prompt_of(choice); }
};

}  // namespace narrows::server
