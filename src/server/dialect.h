// A dialect: a file that turns one family's requests into a GenerationRequest, and the events of its job into
// that family's replies. Everything between is the same for all.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/answer.h"
#include "server/job.h"
#include "server/json_fields.h"

namespace narrows::server {

/// What replies say of the server.
struct ReplyContext {
  std::string model_name;
  std::string fingerprint;  ///< of the model and what runs it
};

/// Replies to one job. Whole ones: add() for every event of kind text or finished, then whole(). Streams:
/// stream() for every event, then stream_end().
class Replies {
 public:
  Replies(const Job& job, ReplyContext context);
  virtual ~Replies() = default;
  Replies(const Replies&) = delete;
  Replies& operator=(const Replies&) = delete;

  void add(const Event& event);
  virtual Json whole() = 0;

  /// What goes to the client, framed; "" if nothing.
  virtual std::string stream(const Event& event) = 0;
  virtual std::string stream_end() = 0;
  virtual std::string stream_error(const ApiError& error) = 0;
  /// Says nothing and keeps the connection; "" if the dialect has no such thing.
  virtual std::string ping() const { return ": ping\n\n"; }
  virtual const char* content_type() const { return "text/event-stream; charset=utf-8"; }

 protected:
  struct Choice {
    Choice(const Job& job, size_t index);
    Answer answer;
    std::vector<TokenLogprob> logprobs;
    ChoiceResult result;
    bool begun = false;
    int64_t n_bytes = 0;  ///< text_offset of completions
    bool calls() const { return !answer.message().tool_calls.empty(); }
  };
  struct Usage {
    int64_t prompt = 0, cached = 0, generated = 0;
  };
  Choice& choice_of(const Event& event) { return choices_[static_cast<size_t>(event.choice)]; }
  /// What an event adds to its choice.
  AnswerDelta take(const Event& event);
  Usage usage() const;

  const Job& job_;
  ReplyContext context_;
  int64_t created_;
  std::vector<Choice> choices_;
};

/// One row for each family of clients.
struct Dialect {
  const char* id_prefix;
  /// Nothing: error says what is wrong.
  std::optional<GenerationRequest> (*parse)(std::string_view body, const RequestDefaults& defaults,
                                            ApiError& error);
  std::unique_ptr<Replies> (*replies)(const Job& job, ReplyContext context);
  /// The body of a refusal.
  Json (*error)(const ApiError& error);
};

extern const Dialect kOpenAiChat;
extern const Dialect kOpenAiCompletion;
extern const Dialect kAnthropic;
extern const Dialect kAnthropicCount;  ///< of tokens, where max_tokens is not needed
extern const Dialect kResponses;
extern const Dialect kNative;  ///< llama.cpp's /completion
extern const Dialect kInfill;
extern const Dialect kOllamaChat;
extern const Dialect kOllamaGenerate;

}  // namespace narrows::server
