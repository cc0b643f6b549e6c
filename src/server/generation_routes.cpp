// /v1/chat/completions and /v1/completions: from the body to a job, and from its events to a reply or a
// stream.
#include <fmt/format.h>

#include <utility>

#include "base/guarded.h"
#include "server/http_impl.h"
#include "server/replies.h"

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

std::string sse(const std::string& data) { return "data: " + data + "\n\n"; }

/// The client of the request that this thread answers.
bool has_left(const httplib::Request& req) {
  SocketStream* const client = SocketStream::of_this_thread();
  return client != nullptr && client->has_left(req.version == "HTTP/1.1");
}

/// A content provider; httplib catches nothing that is thrown from one, the program would end.
template <class Provider>
auto without_exceptions(Provider provider) {
  return [provider = std::move(provider)](size_t offset, httplib::DataSink& to) {
    bool goes_on = false;
    const Status status = guarded("the stream", [&] { goes_on = provider(offset, to); });
    if (status.ok()) return goes_on;
    // The client should know why the stream ends.
    (void)guarded("the last event", [&] {
      const std::string text = sse(to_json(to_api_error(status)));
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
  Streaming(const std::shared_ptr<Job>& of, const std::string& model_name, std::optional<Event> first)
      : job(of), guard(of), replies(*of, model_name), next(std::move(first)), n_open(of->n_choice()) {}
  std::shared_ptr<Job> job;
  CancelAtEnd guard;
  Replies replies;
  std::optional<Event> next;  ///< to be sent before what the channel gives
  int n_open;                 ///< choices that have not ended
  Clock::time_point last_write = Clock::now();
  bool asked = false;  ///< a client that sends no more was written to, which tells whether it is there
  std::chrono::milliseconds look = kLook;
};

}  // namespace

void HttpServer::Impl::add_generation_routes() {
  const auto chat = [this](const httplib::Request& req, httplib::Response& res) { generate(req, res, true); };
  const auto completion = [this](const httplib::Request& req, httplib::Response& res) {
    generate(req, res, false);
  };
  for (const char* path : {"/v1/chat/completions", "/chat/completions"}) http.Post(path, chat);
  for (const char* path : {"/v1/completions", "/completions"}) http.Post(path, completion);
}

std::shared_ptr<Job> HttpServer::Impl::make_job(const httplib::Request& req, bool chat, ApiError& error) {
  if (!has_json_body(req, error)) return nullptr;
  const Tokenizer& tokenizer = model->tokenizer();
  RequestDefaults defaults;
  defaults.n_vocab = tokenizer.n_vocab();
  std::optional<GenerationRequest> request =
      chat ? parse_chat(req.body, defaults, error) : parse_completion(req.body, defaults, error);
  if (!request) return nullptr;

  auto job = std::make_shared<Job>();
  job->id = next_id(chat ? "chatcmpl" : "cmpl");
  job->profile = scheduler.load()->options().session.kv;
  if (!request->kv.empty()) {
    Result<KvProfile> profile = KvProfile::parse(request->kv);
    if (!profile.ok()) {
      error = bad_request(profile.status().message(), "narrows.kv");
      return nullptr;
    }
    job->profile = std::move(*profile);
  }
  const TokenLimits limits = token_limits(req);
  const auto take = [&](const ChatPrompt& prompt) {
    std::optional<std::vector<Token>> tokens = tokens_within(tokenizer, prompt, limits, error);
    if (tokens) job->prompts.push_back(std::move(*tokens));
    return tokens.has_value();
  };
  if (chat) {
    size_t bytes = 0;
    for (const ChatMessage& message : request->messages) bytes += message.content.size();
    if (const auto refused = refuse_bytes(tokenizer, bytes, limits)) {
      error = *refused;
      return nullptr;
    }
    const Result<ChatPrompt> prompt = tokenizer.apply_chat_template(request->messages, true);
    if (!prompt.ok()) {
      error = to_api_error(prompt.status());
      return nullptr;
    }
    if (!take(*prompt)) return nullptr;
  } else {
    for (Prompt& prompt : request->prompts) {  // its text stays for echo
      if (prompt.is_tokens) {
        job->prompts.push_back(std::move(prompt.tokens));
      } else if (!take({prompt.text, {}})) {
        return nullptr;
      }
    }
  }
  job->request = std::move(*request);
  return job;
}

TokenLimits HttpServer::Impl::token_limits(const httplib::Request& req) const {
  return {scheduler.load()->n_ctx(), [this, &req]() -> std::optional<ApiError> {
            if (stopping) return http_error(503, "the server is shutting down");
            if (has_left(req)) return http_error(499, "the client has left");
            return std::nullopt;
          }};
}

void HttpServer::Impl::generate(const httplib::Request& req, httplib::Response& res, bool chat) {
  ApiError error;
  const std::shared_ptr<Job> job = make_job(req, chat, error);
  if (job == nullptr) {
    ++metrics.refused;
    reply(res, error);
    return;
  }
  if (options.log_prompts) log({{"event", "prompt"}, {"id", job->id}, {"body", req.body}});
  if (const std::optional<ApiError> refused = scheduler.load()->submit(job)) {
    reply(res, *refused);
    return;
  }
  if (job->request.stream) {
    stream(job, req, res);
  } else {
    answer_whole(job, req, res);
  }
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

void HttpServer::Impl::answer_whole(const std::shared_ptr<Job>& job, const httplib::Request& req,
                                    httplib::Response& res) {
  const CancelAtEnd guard(job);
  Replies replies(*job, options.model_name);
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
        reply(res, http_error(504, kTooLong));
        return;
      }
    }
    if (!event) continue;
    if (event->kind == Event::Kind::failed) {
      log_job(*job, {}, "failed");
      reply(res, event->error);
      return;
    }
    replies.add(*event);
    if (event->kind != Event::Kind::finished) continue;
    log_job(*job, event->result, event->result.finish_reason);
    --n_open;
  }
  const Json whole = replies.whole();
  if (options.log_prompts) log({{"event", "answer"}, {"id", job->id}, {"choices", whole["choices"]}});
  reply(res, whole);
}

void HttpServer::Impl::stream(std::shared_ptr<Job> job, const httplib::Request& /*req*/,
                              httplib::Response& res) {
  std::optional<Event> first = job->channel.pop(kEarly);
  if (first && first->kind == Event::Kind::failed) {
    job->channel.cancel();
    reply(res, first->error);
    return;
  }
  auto state = std::make_shared<Streaming>(job, options.model_name, std::move(first));
  res.set_header("Cache-Control", "no-cache");
  res.set_header("X-Accel-Buffering", "no");  // a proxy should pass on every token
  res.set_chunked_content_provider(
      "text/event-stream; charset=utf-8", without_exceptions([this, state](size_t, httplib::DataSink& to) {
        Streaming& s = *state;
        const Job& of = *s.job;
        const auto write = [&](const std::string& text) {
          s.last_write = Clock::now();
          return to.write(text.data(), text.size());
        };
        std::optional<Event> event = std::move(s.next);
        s.next.reset();
        if (!event) event = s.job->channel.pop(std::exchange(s.look, kLook));
        if (took_too_long(of)) {
          log_job(of, {}, "timeout");
          (void)write(sse(to_json(http_error(504, kTooLong))));
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
          return write(": ping\n\n");
        }
        if (event->kind == Event::Kind::failed) {
          log_job(of, {}, "failed");
          (void)write(sse(to_json(event->error)));
          to.done();
          return true;
        }
        const Json chunk = s.replies.chunk(*event);
        if (!chunk.is_null() && !write(sse(dump(chunk)))) {
          log_job(of, {}, "client gone");
          return false;
        }
        if (event->kind != Event::Kind::finished) return true;
        log_job(of, event->result, event->result.finish_reason);
        if (--s.n_open > 0) return true;
        std::string end = of.request.include_usage ? sse(dump(s.replies.usage_chunk())) : "";
        end += sse("[DONE]");
        if (!write(end)) return false;
        to.done();
        return true;
      }));
}

}  // namespace narrows::server
