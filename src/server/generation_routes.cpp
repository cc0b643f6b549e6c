// The one way of all generations, whatever their dialect: from the body to a job, and from its events to a
// reply or a stream.
#include <fmt/format.h>

#include <utility>

#include "base/guarded.h"
#include "sample/grammar.h"
#include "server/dialect.h"
#include "server/http_impl.h"
#include "server/replies.h"
#include "text/infill.h"

namespace narrows::server {

namespace {

/// How soon a client that has gone is noticed.
constexpr std::chrono::milliseconds kLook{200};
/// For the connection to be reset by a client that is not there any more.
constexpr std::chrono::milliseconds kAnswer{10};
/// A comment that keeps proxies and clients from giving up while a long prompt is read.
constexpr double kPingEvery_s = 2;
/// An error that comes this early is told by the HTTP code; later, the stream has begun.
constexpr std::chrono::milliseconds kEarly{150};

constexpr const char* kTooLong = "the answer took longer than this server allows";

/// The client of the request that this thread answers.
bool has_left(const httplib::Request& req) {
  SocketStream* const client = SocketStream::of_this_thread();
  return client != nullptr && client->has_left(req.version == "HTTP/1.1");
}

/// A content provider; httplib catches nothing that is thrown from one, the program would end.
template <class Provider>
auto without_exceptions(std::shared_ptr<Replies> replies, Provider provider) {
  return
      [replies = std::move(replies), provider = std::move(provider)](size_t offset, httplib::DataSink& to) {
        bool goes_on = false;
        const Status status = guarded("the stream", [&] { goes_on = provider(offset, to); });
        if (status.ok()) return goes_on;
        // The client should know why the stream ends.
        (void)guarded("the last event", [&] {
          const std::string text = replies->stream_error(to_api_error(status));
          goes_on = to.write(text.data(), text.size());
          if (goes_on) to.done();
        });
        return goes_on;
      };
}

/// Cancels the job when the handler is left, however that happens.
class CancelAtEnd {
 public:
  explicit CancelAtEnd(std::shared_ptr<Job> job) : job_(std::move(job)) {}
  ~CancelAtEnd() { job_->channel.cancel(); }
  CancelAtEnd(const CancelAtEnd&) = delete;
  CancelAtEnd& operator=(const CancelAtEnd&) = delete;

 private:
  std::shared_ptr<Job> job_;
};

/// A stream on its way.
struct Streaming {
  Streaming(const std::shared_ptr<Job>& of, std::unique_ptr<Replies> writer, std::optional<Event> first)
      : job(of), guard(of), replies(std::move(writer)), next(std::move(first)), n_open(of->n_choice()) {}
  std::shared_ptr<Job> job;
  CancelAtEnd guard;
  std::shared_ptr<Replies> replies;
  std::optional<Event> next;  ///< to be sent before what the channel gives
  int n_open;                 ///< choices that have not ended
  Clock::time_point last_write = Clock::now();
  bool asked = false;  ///< a client that sends no more was written to, which tells whether it is there
  std::chrono::milliseconds look = kLook;
};

/// Bytes of all that goes into the prompt.
size_t bytes_of(const ChatRequest& chat) {
  size_t bytes = 0;
  for (const ChatMessage& m : chat.messages) {
    bytes += m.content.size();
    for (const ToolCall& call : m.tool_calls) bytes += call.arguments.size();
  }
  return bytes;
}

/// The answer is written as its format says.
void follow(const AnswerFormat& format, GenerationRequest& r) {
  r.stops.insert(r.stops.end(), format.stops.begin(), format.stops.end());
  if (format.grammar.empty()) return;
  r.grammar = format.grammar;
  r.sampling.grammar_prefix = format.grammar_prefix;
  r.sampling.grammar_words = format.words;
  r.sampling.grammar_patterns = format.patterns;
  r.sampling.thinking_begin = format.thinking_begin;
  r.sampling.thinking_ends = format.thinking_ends;
  r.sampling.begins_thinking = format.begins_thinking;
}

}  // namespace

void HttpServer::Impl::add_generation_routes() {
  const auto add = [this](const char* path, const Dialect& dialect) {
    http.post(path, [this, &dialect](const httplib::Request& req, httplib::Response& res) {
      generate(req, res, dialect);
    });
  };
  add("/v1/chat/completions", kOpenAiChat);
  add("/chat/completions", kOpenAiChat);
  add("/v1/completions", kOpenAiCompletion);
  add("/completions", kOpenAiCompletion);
  add("/completion", kNative);
  add("/infill", kInfill);
  add("/v1/responses", kResponses);
  add("/v1/messages", kAnthropic);
  add("/api/chat", kOllamaChat);
  add("/api/generate", kOllamaGenerate);
}

RequestDefaults HttpServer::Impl::defaults() const {
  RequestDefaults d = options.defaults;
  d.n_vocab = model->tokenizer().n_vocab();
  d.n_ctx = scheduler.load()->n_ctx();
  d.n_slots = scheduler.load()->options().n_slots;
  return d;
}

bool HttpServer::Impl::prepare(const httplib::Request& req, Job& job, ApiError& error) {
  GenerationRequest& request = job.request;
  const Tokenizer& tokenizer = model->tokenizer();
  const TokenLimits limits = token_limits(req);
  const auto take = [&](const ChatPrompt& prompt) {
    std::optional<std::vector<Token>> tokens = tokens_within(tokenizer, prompt, limits, error);
    if (tokens) job.prompts.push_back(std::move(*tokens));
    return tokens.has_value();
  };
  if (request.infill) {
    const Infill& gap = *request.infill;
    const Result<ChatPrompt> prompt = infill_prompt(tokenizer, gap.before, gap.behind, gap.begun);
    if (!prompt.ok()) {
      error = to_api_error(prompt.status());
      return false;
    }
    return take(*prompt);
  }
  if (!request.chat) {
    for (Prompt& prompt : request.prompts) {  // its text stays for echo
      if (prompt.is_tokens) {
        if (request.echo) {
          Utf8Stream text;
          prompt.text = text.push(tokenizer.decode(prompt.tokens, true));
          prompt.text += text.flush();
        }
        job.prompts.push_back(std::move(prompt.tokens));
      } else if (!take({prompt.text, {}})) {
        return false;
      }
    }
    return true;
  }
  if (const auto refused = refuse_bytes(tokenizer, bytes_of(request.conversation), limits)) {
    error = *refused;
    return false;
  }
  if (!request.conversation.tools.empty() && !knows_tools(tokenizer)) {
    error = bad_request(
        "the model's chat template knows no tools; leave tools out or serve a model that was made for them",
        "tools");
    return false;
  }
  Result<PreparedChat> prepared = prepare_chat(tokenizer, request.conversation);
  if (!prepared.ok()) {
    error = to_api_error(prepared.status());
    return false;
  }
  job.format = std::move(prepared->format);
  if (job.format != nullptr) {
    follow(*job.format, request);
    const Status good = request.grammar.empty() ? Status() : check_grammar(request.grammar);
    if (!good.ok()) {
      error = bad_request("tools cannot be used: " + good.message(), "tools");
      return false;
    }
  }
  if (!request.reasoning_effort.empty() && !prepared->knows_effort)
    request.warnings.push_back("the model's chat template knows no reasoning_effort, which was ignored");
  return take(prepared->prompt);
}

std::shared_ptr<Job> HttpServer::Impl::make_job(const httplib::Request& req, const Dialect& dialect,
                                                ApiError& error) {
  if (!has_json_body(req, error)) return nullptr;
  std::optional<GenerationRequest> request = dialect.parse(req.body, defaults(), error);
  if (!request) return nullptr;
  auto job = std::make_shared<Job>();
  job->id = next_id(dialect.id_prefix);
  job->profile = scheduler.load()->options().session.kv;
  if (!request->kv.empty()) {
    Result<KvProfile> profile = KvProfile::parse(request->kv);
    if (!profile.ok()) {
      error = bad_request(profile.status().message(), "narrows.kv");
      return nullptr;
    }
    job->profile = std::move(*profile);
  }
  job->request = std::move(*request);
  return prepare(req, *job, error) ? job : nullptr;
}

TokenLimits HttpServer::Impl::token_limits(const httplib::Request& req) const {
  return {scheduler.load()->n_ctx(), [this, &req]() -> std::optional<ApiError> {
            if (stopping) return http_error(503, "the server is shutting down");
            if (has_left(req)) return http_error(499, "the client has left");
            return std::nullopt;
          }};
}

void HttpServer::Impl::generate(const httplib::Request& req, httplib::Response& res, const Dialect& dialect) {
  ApiError error;
  const std::shared_ptr<Job> job = make_job(req, dialect, error);
  if (job == nullptr) {
    ++metrics.refused;
    reply(res, error, dialect.error);
    return;
  }
  if (options.log_prompts) log({{"event", "prompt"}, {"id", job->id}, {"body", req.body}});
  if (!job->request.warnings.empty())
    log({{"event", "warning"}, {"id", job->id}, {"warnings", job->request.warnings}});
  if (const std::optional<ApiError> refused = scheduler.load()->submit(job)) {
    reply(res, *refused, dialect.error);
    return;
  }
  if (job->request.stream) {
    stream(job, dialect, res);
  } else {
    answer_whole(job, dialect, req, res);
  }
}

ReplyContext HttpServer::Impl::reply_context() const {
  return {options.model_name, "narrows-" + model->info().fingerprint.substr(0, 16)};
}

bool HttpServer::Impl::took_too_long(const Job& job) const {
  return seconds_since(job.arrived) > static_cast<double>(options.request_timeout.count());
}

void HttpServer::Impl::log_job(const Job& job, const ChoiceResult& r, const char* outcome) const {
  log({{"event", "generation"},
       {"id", job.id},
       {"outcome", outcome},
       {"kv", r.kv},
       {"prompt_tokens", r.n_prompt},
       {"cached_tokens", r.n_cached},
       {"generated_tokens", r.n_generated},
       {"queue_s", r.queue_s},
       {"prefill_s", r.prefill_s},
       {"decode_s", r.decode_s},
       {"cache_bytes", r.cache.bytes}});
}

void HttpServer::Impl::answer_whole(const std::shared_ptr<Job>& job, const Dialect& dialect,
                                    const httplib::Request& req, httplib::Response& res) {
  const CancelAtEnd guard(job);
  const std::unique_ptr<Replies> replies = dialect.replies(*job, reply_context());
  int n_open = job->n_choice();
  Clock::time_point looked = Clock::now();
  while (n_open > 0) {
    const std::optional<Event> event = job->channel.pop(kLook);
    if (Clock::now() - looked >= kLook) {
      looked = Clock::now();
      if (has_left(req)) {
        log_job(*job, {}, "client gone");
        res.status = 499;
        return;
      }
      if (took_too_long(*job)) {
        log_job(*job, {}, "timeout");
        reply(res, http_error(504, kTooLong), dialect.error);
        return;
      }
    }
    if (!event) continue;
    if (event->kind == Event::Kind::failed) {
      log_job(*job, {}, "failed");
      reply(res, event->error, dialect.error);
      return;
    }
    replies->add(*event);
    if (event->kind != Event::Kind::finished) continue;
    log_job(*job, event->result, event->result.finish_reason);
    --n_open;
  }
  const Json whole = replies->whole();
  if (options.log_prompts) log({{"event", "answer"}, {"id", job->id}, {"reply", whole}});
  reply(res, whole);
}

void HttpServer::Impl::stream(std::shared_ptr<Job> job, const Dialect& dialect, httplib::Response& res) {
  std::optional<Event> first = job->channel.pop(kEarly);
  if (first && first->kind == Event::Kind::failed) {
    job->channel.cancel();
    reply(res, first->error, dialect.error);
    return;
  }
  auto state = std::make_shared<Streaming>(job, dialect.replies(*job, reply_context()), std::move(first));
  res.set_header("Cache-Control", "no-cache");
  res.set_header("X-Accel-Buffering", "no");  // a proxy should pass on every token
  res.set_chunked_content_provider(
      state->replies->content_type(),
      without_exceptions(state->replies, [this, state](size_t, httplib::DataSink& to) {
        Streaming& s = *state;
        const Job& of = *s.job;
        const auto write = [&](const std::string& text) {
          if (text.empty()) return true;
          s.last_write = Clock::now();
          return to.write(text.data(), text.size());
        };
        std::optional<Event> event = std::move(s.next);
        s.next.reset();
        if (!event) event = s.job->channel.pop(std::exchange(s.look, kLook));
        if (took_too_long(of)) {
          log_job(of, {}, "timeout");
          (void)write(s.replies->stream_error(http_error(504, kTooLong)));
          to.done();
          return true;
        }
        if (!event) {
          if (!to.is_writable()) {
            log_job(of, {}, "client gone");
            return false;
          }
          const SocketStream* client = SocketStream::of_this_thread();
          if (!s.asked && client != nullptr && client->peer_sends_no_more()) {
            s.asked = true;
            s.look = kAnswer;
          } else if (seconds_since(s.last_write) < kPingEvery_s) {
            return true;
          }
          return write(s.replies->ping());
        }
        if (event->kind == Event::Kind::failed) {
          log_job(of, {}, "failed");
          (void)write(s.replies->stream_error(event->error));
          to.done();
          return true;
        }
        if (!write(s.replies->stream(*event))) {
          log_job(of, {}, "client gone");
          return false;
        }
        if (event->kind != Event::Kind::finished) return true;
        log_job(of, event->result, event->result.finish_reason);
        if (--s.n_open > 0) return true;
        if (!write(s.replies->stream_end())) return false;
        to.done();
        return true;
      }));
}

}  // namespace narrows::server
