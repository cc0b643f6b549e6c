// `narrows serve`: the model behind an OpenAI-compatible HTTP server.
#include <fmt/format.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "base/file.h"
#include "base/utf8.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/output.h"
#include "narrows/sampling.h"
#include "server/http_server.h"
#include "server/replies.h"
#include "server/scheduler.h"

namespace narrows::cli {
namespace {

constexpr int64_t kMaxKeyFile = int64_t{1} << 20;
constexpr int64_t kMegabyte = 1'000'000;
/// What requests at work get to finish in when the server is asked to end.
constexpr std::chrono::seconds kPatience{10};

constexpr const char* kFooter =
    R"(Serves /v1/chat/completions (with tools), /v1/completions, /v1/embeddings, /v1/models, /health, /metrics, /props, /tokenize, /detokenize,
/apply-template, /slots, and a chat page at /. docs/server_api.md has the fields. One line of JSON a request goes to standard error.
SIGTERM or Ctrl-C ends it: requests at work have 10 seconds to finish, new ones are refused. A second one ends it at once,
as one while the model is loaded does.

Examples:
  narrows serve -m model.gguf                                  then open http://127.0.0.1:8080
  narrows serve -m model.gguf --slots 8 --ctx 16384 --kv klt-10x --session-dir sessions
  narrows serve -m model.gguf --host 0.0.0.0 --api-key-file keys.txt
  narrows serve -m model.gguf --alias coder --temp 0.2 -n 2048 defaults of requests that do not say
  curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" \
    -d '{"messages": [{"role": "user", "content": "Hello"}]}')";

struct ServeFlags {
  ModelFlags model;
  SessionFlags session;
  SamplerFlags sampler;
  server::HttpOptions http;
  server::SchedulerOptions scheduler;
  std::string api_key_file;
  std::string alias;
  std::optional<int64_t> n_predict;
  std::string pooling;
  std::optional<int64_t> cache_mb;
  std::optional<int64_t> prefix_mb;
  int64_t body_mb = 64;
  int64_t timeout_s = 3600;
};

/// One key a line; empty lines and those that begin with '#' are none.
Result<std::vector<std::string>> read_keys(const std::string& path) {
  Result<std::string> text = read_file(path, kMaxKeyFile);
  if (!text.ok()) return text.status();
  drop_byte_order_mark(*text);
  std::vector<std::string> keys;
  size_t begin = 0;
  while (begin < text->size()) {
    const size_t end = std::min(text->find('\n', begin), text->size());
    std::string key = text->substr(begin, end - begin);
    begin = end + 1;
    while (!key.empty() && (key.back() == '\r' || key.back() == ' ' || key.back() == '\t')) key.pop_back();
    if (!key.empty() && key[0] != '#') keys.push_back(std::move(key));
  }
  if (keys.empty())
    return Status(StatusCode::invalid_file,
                  fmt::format("{} holds no API key: write one a line", quote(path)));
  return keys;
}

Status check_folder(const std::string& path) {
  std::error_code failed;
  if (!std::filesystem::is_directory(path, failed))
    return {StatusCode::invalid_argument,
            fmt::format("--session-dir {} is no folder; make it first", quote(path))};
  return check_writable(path + "/session");
}

/// Lines from any thread, whole.
server::LogSink log_to_stderr() {
  return [mutex = std::make_shared<std::mutex>()](const std::string& line) {
    const std::lock_guard<std::mutex> lock(*mutex);
    note(line);
  };
}

/// SIGTERM and SIGINT, taken by a thread of their own. Before ready() the first one ends the process, since
/// nothing is served yet; later it makes wait() return, and the second one ends the process. The exit code is
/// then 128 and the signal's number. (Not the signals' own effect: process 1 of a container has none.)
class EndSignals {
 public:
  EndSignals() {
    (void)::sigemptyset(&set_);
    (void)::sigaddset(&set_, SIGTERM);
    (void)::sigaddset(&set_, SIGINT);
    (void)::pthread_sigmask(SIG_BLOCK, &set_, nullptr);  // threads that are made later take them neither
    thread_ = std::thread([this] { run(); });
  }
  ~EndSignals() {
    ended_ = true;
    (void)::pthread_kill(thread_.native_handle(), SIGTERM);
    thread_.join();
  }
  EndSignals(const EndSignals&) = delete;
  EndSignals& operator=(const EndSignals&) = delete;

  void ready() { ready_ = true; }
  int wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    came_.wait(lock, [this] { return number_ != 0; });
    return number_;
  }

 private:
  void run() {
    while (true) {
      int number = 0;
      if (::sigwait(&set_, &number) != 0) continue;
      if (ended_) return;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!ready_ || number_ != 0) ::_exit(128 + number);
        number_ = number;
      }
      came_.notify_one();
    }
  }

  sigset_t set_{};
  std::atomic<bool> ended_{false};
  std::atomic<bool> ready_{false};
  std::mutex mutex_;
  std::condition_variable came_;
  int number_ = 0;  ///< of the first one
  std::thread thread_;
};

/// Room for so many connections beside what the process has open: the soft limit is often 1,024.
void raise_open_files(int64_t n_connections) {
  rlimit limit{};
  const auto want = static_cast<rlim_t>(n_connections + 256);
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= want) return;
  limit.rlim_cur = std::min(want, limit.rlim_max);
  (void)::setrlimit(RLIMIT_NOFILE, &limit);
}

/// "[::1]" for an address with colons, as URLs want it.
std::string url_host(const std::string& host) {
  return host.find(':') != std::string::npos && host[0] != '[' ? "[" + host + "]" : host;
}

Outcome serve(const ServeFlags& flags) {
  Result<SessionOptions> session = flags.session.parse();
  if (!session.ok()) return session.status();
  server::HttpOptions http = flags.http;
  if (!flags.api_key_file.empty()) {
    Result<std::vector<std::string>> keys = read_keys(flags.api_key_file);
    if (!keys.ok()) return keys.status();
    http.api_keys = std::move(*keys);
  }
  if (!http.session_dir.empty()) {
    if (Status s = check_folder(http.session_dir); !s.ok()) return s;
  }
  if (Status s = check_readable(flags.model.path); !s.ok()) return s;
  http.max_body_bytes = static_cast<size_t>(flags.body_mb * kMegabyte);
  http.request_timeout = std::chrono::seconds(flags.timeout_s);
  http.model_name =
      flags.alias.empty() ? std::filesystem::path(flags.model.path).stem().string() : flags.alias;
  http.defaults.sampling = flags.sampler.resolve();
  if (!flags.pooling.empty())
    http.pooling = flags.pooling == "mean" ? server::Pooling::mean : server::Pooling::last;
  http.defaults.has_seed = flags.sampler.seed.has_value();
  if (flags.n_predict && *flags.n_predict >= 0) http.defaults.max_tokens = flags.n_predict;
  if (const auto good = Sampler::create(http.defaults.sampling); !good.ok()) return good.status();
  server::SchedulerOptions scheduling = flags.scheduler;
  scheduling.session = *session;
  scheduling.memory_bytes = flags.cache_mb.value_or(0) * kMegabyte;
  scheduling.store_bytes = flags.prefix_mb ? *flags.prefix_mb * kMegabyte : -1;

  http.n_generations = scheduling.n_slots + scheduling.max_waiting;
  raise_open_files(http.max_connections + 2 * http.n_generations);

  EndSignals signals;
  const server::LogSink log = log_to_stderr();
  Result<std::unique_ptr<server::HttpServer>> listening = server::HttpServer::start(http, log);
  if (!listening.ok()) return listening.status();
  server::HttpServer& web = **listening;
  const auto say = [&](const server::Json& fields) { log(server::dump(fields)); };
  say({{"event", "listening"},
       {"url", fmt::format("http://{}:{}", url_host(http.host), web.port())},
       {"keys", http.api_keys.size()},
       {"sessions", http.session_dir}});
  Result<std::shared_ptr<const Model>> model = flags.model.load({}, [&](const std::string& warning) {
    say({{"event", "warning"}, {"message", warning}});
  });
  if (!model.ok()) return model.status();
  Result<std::unique_ptr<server::Scheduler>> scheduler =
      server::Scheduler::create(*model, scheduling, &web.metrics());
  if (!scheduler.ok()) return scheduler.status();
  web.serve(*model, scheduler->get());
  signals.ready();
  say({{"event", "ready"},
       {"model", http.model_name},
       {"kv", session->kv.name},
       {"n_ctx", (*scheduler)->n_ctx()},
       {"slots", scheduling.n_slots},
       {"cache_limit_bytes", (*scheduler)->memory_limit()}});

  const int number = signals.wait();
  say({{"event", "ending"}, {"signal", number}});
  const bool all_ended = web.stop(kPatience);
  say({{"event", "ended"}});
  // Nobody waits for what the threads do that are still at work, and nothing that they could leave half done.
  if (!all_ended) ::_exit(0);
  return {};
}

}  // namespace

Command make_serve_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("serve", "Serve the model over HTTP, as OpenAI's API does");
  auto flags = std::make_shared<ServeFlags>();
  flags->model.add_to(*command);
  flags->model.add_device_to(*command);
  flags->model.add_template_to(*command);
  command->add_option("--host", flags->http.host, "address to listen on")
      ->type_name("ADDRESS")
      ->capture_default_str();
  command->add_option("--port", flags->http.port, "port to listen on; 0: any free one")
      ->type_name("N")
      ->check(whole_number(0, 65535))
      ->capture_default_str();
  command->add_option("--slots", flags->scheduler.n_slots, "requests that are answered at the same time")
      ->type_name("N")
      ->check(whole_number(1, DecodeBatch::kMaxSessions))
      ->capture_default_str();
  command
      ->add_option("--queue", flags->scheduler.max_waiting,
                   "requests that may wait for a slot; more are refused with 429")
      ->type_name("N")
      ->check(whole_number(0, 4000))
      ->capture_default_str();
  flags->session.add_to(*command);
  command->add_option("--alias", flags->alias, "name of the model in replies (default: the file's)")
      ->type_name("NAME");
  command
      ->add_option(
          "-n,--tokens-to-generate", flags->n_predict,
          "most tokens of an answer whose request does not say; -1: until the context is full (default)")
      ->type_name("N")
      ->check(whole_number(-1, 1'000'000'000));
  command
      ->add_option("--pooling", flags->pooling,
                   "how embeddings are made of a text's hidden states: mean, or last (of its last token) "
                   "(default: as the file says, else mean)")
      ->type_name("WHICH")
      ->check(CLI::IsMember({"mean", "last"}));
  flags->sampler.add_to(*command);
  command
      ->add_option("--cache-mb", flags->cache_mb,
                   "most memory of all caches (default: four fifths of what is free when the model is there)")
      ->type_name("MB")
      ->check(whole_number(1, 100'000'000));
  command
      ->add_option("--prefix-mb", flags->prefix_mb,
                   "of it, what may be kept of prompts that no slot works on (default: a quarter)")
      ->type_name("MB")
      ->check(whole_number(0, 100'000'000));
  command->add_option("--session-dir", flags->http.session_dir, "folder where slots are saved and restored")
      ->type_name("FOLDER");
  command->add_option("--api-key-file", flags->api_key_file, "file with the keys that are let in, one a line")
      ->type_name("FILE");
  command
      ->add_option("--cors-origin", flags->http.cors_origin,
                   "web pages from this origin may use the server (default: none but its own)")
      ->type_name("ORIGIN");
  command
      ->add_option(
          "--connections", flags->http.max_connections,
          "open connections beside those that are answered; of more the one that waited longest is closed")
      ->type_name("N")
      ->check(whole_number(1, 4096))
      ->capture_default_str();
  command->add_option("--body-mb", flags->body_mb, "largest body of a request")
      ->type_name("MB")
      ->check(whole_number(1, 2000))
      ->capture_default_str();
  command->add_option("--timeout", flags->timeout_s, "longest time of a request in seconds")
      ->type_name("S")
      ->check(whole_number(1, 1'000'000))
      ->capture_default_str();
  command->add_flag("--log-prompts", flags->http.log_prompts, "write prompts and answers to the log too");
  command->footer(kFooter);
  return {command, [flags] { return serve(*flags); }};
}

}  // namespace narrows::cli
