// HTTP around the scheduler: routes, keys, limits, streams of server-sent events. cpp-httplib's own types
// stay in http_server.cpp and the *_routes.cpp files.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "narrows/engine.h"
#include "narrows/status.h"
#include "server/metrics.h"
#include "server/scheduler.h"

namespace narrows::server {

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8080;                    ///< 0: any free one
  std::vector<std::string> api_keys;  ///< none: everybody is let in
  std::string cors_origin;            ///< value of Access-Control-Allow-Origin; "": no CORS headers at all
  std::string session_dir;            ///< where slots are saved; "": they cannot be
  std::string model_name;             ///< as /v1/models says
  size_t max_body_bytes = size_t{64} << 20;
  int max_connections = 256;  ///< open without a request that is answered; the one that waited longest goes
  int n_generations = 68;     ///< generations that may be answered and wait at once: --slots and --queue
  std::chrono::milliseconds head_timeout{10'000};  ///< of a request's head, from its first byte to its last
  /// Of a body, and of one write; 1 s more for each 100 kB of it.
  std::chrono::milliseconds io_timeout{30'000};
  std::chrono::seconds request_timeout{3600};  ///< of a whole generation
  std::optional<Pooling> pooling;              ///< of embeddings; nothing: as the file says, else the mean
  bool log_prompts = false;                    ///< prompts and answers in the log: off, they are the users'
  RequestDefaults defaults;                    ///< of what a request does not say
};

/// Takes one line of JSON, without the newline. From any thread.
using LogSink = std::function<void(const std::string& line)>;

class HttpServer {
 public:
  /// Binds and answers from now on: 503 until serve() is called. invalid_argument if the address cannot be
  /// had.
  static Result<std::unique_ptr<HttpServer>> start(const HttpOptions& options, LogSink log);
  /// As stop(), and waits for all threads.
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const;
  Metrics& metrics();
  /// The model is there; both outlive the server.
  void serve(std::shared_ptr<const Model> model, Scheduler* scheduler);

  /// Refuses new requests with 503 (but /health and /metrics, which go on), lets those at work finish for
  /// `patience`, ends the rest with an error, closes everything when its last byte is written, and returns
  /// when all threads have ended. Clients that do not take those bytes within 2 s are cut. False if a thread
  /// is still at work after all that, on something that cannot be interrupted (a text that is cut into
  /// tokens); its client has been told, and the destructor waits for it.
  bool stop(std::chrono::milliseconds patience);

  struct Impl;

 private:
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// True if a and b are equal; takes the same time wherever they differ.
bool equal_in_constant_time(const std::string& a, const std::string& b);

/// ok if it can name a file in the session folder: letters, digits, '.', '-' and '_', not beginning with a
/// '.'.
Status check_session_name(const std::string& name);

}  // namespace narrows::server
