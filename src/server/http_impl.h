// The inside of HttpServer, for the files that register its routes.
#pragma once

#include <httplib.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <regex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "server/dialect.h"
#include "server/front.h"
#include "server/http_server.h"
#include "server/json_fields.h"
#include "server/prompt_tokens.h"
#include "server/socket_stream.h"

namespace narrows::server {

/// cpp-httplib without its connections: it parses and answers requests that the front has read.
class Listener : public httplib::Server {
 public:
  /// Gives `accepted` every new connection until close(), after bind_to_port(). cpp-httplib's own loop spins
  /// while the process has no descriptor left.
  void accept_all(const std::function<void(int socket)>& accepted);
  /// Last of all: from then on cpp-httplib cuts streams.
  void close();
  /// True if the connection may go on.
  bool answer(const Connection& connection, SocketStream& stream);

  /// Get() and Post() of patterns that methods_of() knows; bodies come decoded.
  void get(const std::string& pattern, Handler handler);
  void post(const std::string& pattern, Handler handler);
  /// What a path takes, "GET, HEAD" say; "" if there is no such path.
  std::string methods_of(const std::string& path) const;

  size_t max_body_bytes = 0;  ///< once decoded

 private:
  struct Route {
    std::regex path;
    const char* methods;
  };
  std::vector<Route> routes_;
};

struct HttpServer::Impl {
  Impl(const HttpOptions& options, LogSink log);

  // http_server.cpp
  void set_up();
  bool start_front();
  bool wants_body(const RequestFrame& frame) const;
  void allow_cors(const httplib::Request& req, httplib::Response& res) const;
  bool let_in(const httplib::Request& req) const;
  bool is_from_foreign_page(const httplib::Request& req) const;
  void log_request(const httplib::Request& req, const httplib::Response& res);
  void log(Json fields) const;
  std::string next_id(const char* prefix);

  // embedding_routes.cpp
  void add_embedding_routes();
  enum class EmbeddingForm { openai, native };
  void embed(const httplib::Request& req, httplib::Response& res, EmbeddingForm form);
  /// Of the options, else of the file; nothing: error says why.
  std::optional<Pooling> pooling(ApiError& error) const;
  std::optional<std::vector<std::vector<Token>>> embedding_tokens(const EmbeddingRequest& request,
                                                                  const TokenLimits& limits,
                                                                  ApiError& error) const;
  /// Vectors of the prompts, a few at a time; nothing: error says why.
  std::optional<std::vector<std::vector<float>>> vectors_of(std::span<const std::vector<Token>> prompts,
                                                            Pooling pooling, const TokenLimits& limits,
                                                            ApiError& error);

  // generation_routes.cpp, dialect_routes.cpp, small_routes.cpp, slot_routes.cpp
  void add_generation_routes();
  void add_dialect_routes();
  void add_small_routes();
  void add_slot_routes();
  void generate(const httplib::Request& req, httplib::Response& res, const Dialect& dialect);
  RequestDefaults defaults() const;
  ReplyContext reply_context() const;
  /// A job whose prompt is tokens; null: error says why not.
  std::shared_ptr<Job> make_job(const httplib::Request& req, const Dialect& dialect, ApiError& error);
  bool prepare(const httplib::Request& req, Job& job, ApiError& error);
  void stream(std::shared_ptr<Job> job, const Dialect& dialect, httplib::Response& res);
  void answer_whole(const std::shared_ptr<Job>& job, const Dialect& dialect, const httplib::Request& req,
                    httplib::Response& res);
  bool took_too_long(const Job& job) const;
  TokenLimits token_limits(const httplib::Request& req) const;
  void log_job(const Job& job, const ChoiceResult& result, const char* outcome) const;

  bool ready() const { return scheduler.load() != nullptr; }

  HttpOptions options;
  LogSink sink;
  Metrics metrics;
  Listener http;
  int port = 0;
  std::thread thread;
  std::shared_ptr<const Model> model;  ///< set before scheduler
  std::atomic<Scheduler*> scheduler{nullptr};
  std::atomic<bool> stopping{false};
  std::atomic<uint64_t> n_id{0};
  std::unique_ptr<Front> front;  ///< last: its threads use what is above
};

/// Sends JSON.
void reply(httplib::Response& res, const Json& json, int code = 200);
void reply(httplib::Response& res, const ApiError& error);
/// The same in the words of a dialect.
void reply(httplib::Response& res, const ApiError& error, Json (*words)(const ApiError&));

/// True if the body may be read as JSON: application/json, or no type at all (as curl -d without -H has
/// another, a form in a foreign web page cannot send this without the browser asking first).
bool has_json_body(const httplib::Request& req, ApiError& error);

}  // namespace narrows::server
