// Start and stop, keys, CORS, limits, errors of HTTP itself, the log.
#include "server/http_server.h"

#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <random>

#include "server/body_encoding.h"
#include "server/http_impl.h"
#include "server/replies.h"

namespace narrows::server {

namespace {

/// Half of the descriptors that may be open, but for those of files: connections that wait get it, and those
/// whose request is at work the other half, so that there always is one for a connection that asks for
/// /health.
size_t within_descriptors(size_t wanted) {
  constexpr rlim_t kFiles = 32;
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return wanted;
  const rlim_t free = limit.rlim_cur > kFiles ? limit.rlim_cur - kFiles : 0;
  return std::min(wanted, static_cast<size_t>(std::max<rlim_t>(free / 2, 4)));
}

/// Requests of a connection.
constexpr int kMostRequests = 100;
/// Requests that are answered beside the generations: token counts, saves, the page.
constexpr size_t kOtherRequests = 16;
/// What clients have to take the last bytes in when the server ends.
constexpr std::chrono::milliseconds kLastWords{2000};

/// While there is no descriptor for a new connection; it waits in the system's queue.
constexpr std::chrono::milliseconds kNoDescriptor{20};

/// Paths that need no key: whether the server lives, and the page that asks for one.
bool is_public(const std::string& path) {
  return path == "/health" || path == "/" || path == "/index.html" || path == "/chat.js" ||
         path == "/markdown.js" || path == "/store.js" || path == "/chat.css";
}

bool is_loopback(const std::string& host) {
  const bool is_v4 =
      host.compare(0, 4, "127.") == 0 && host.find_first_not_of("0123456789.") == std::string::npos;
  return is_v4 || host == "localhost" || host == "::1" || host == "[::1]";
}

/// "name:80" and "[::1]:80" without the port; "localhost:1@evil" is no name with a port.
std::string without_port(const std::string& host) {
  const size_t colon = host.rfind(':');
  const bool has_port =
      colon != std::string::npos && host.find_first_not_of("0123456789", colon + 1) == std::string::npos;
  return has_port ? host.substr(0, colon) : host;
}

/// Where answer() keeps a request's Content-Encoding.
constexpr const char* kEncoding = "X-Narrows-Content-Encoding";

const char* reason_of(int code) {
  switch (code) {
    case 400:
      return "the request is no well-formed HTTP";
    case 404:
      return "there is no such path";
    case 405:
      return "this path does not take that method";
    case 413:
      return "the body is larger than this server takes";
    case 414:
      return "the path is longer than this server takes";
    case 415:
      return "the body must be application/json";
    case 431:
      return "the headers are larger than this server takes";
    default:
      return "the request could not be answered";
  }
}

}  // namespace

bool equal_in_constant_time(const std::string& a, const std::string& b) {
  size_t difference = a.size() ^ b.size();
  for (size_t i = 0; i < a.size(); ++i)
    difference |= static_cast<size_t>(static_cast<unsigned char>(a[i]) ^
                                      static_cast<unsigned char>(b.empty() ? 0 : b[i % b.size()]));
  return difference == 0;
}

Status check_session_name(const std::string& name) {
  const auto good = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '-' || c == '_';
  };
  if (!name.empty() && name.size() <= 200 && name[0] != '.' && std::all_of(name.begin(), name.end(), good))
    return {};
  return {StatusCode::invalid_argument,
          "filename must have 1 to 200 letters, digits, '.', '-' and '_', and not begin with '.'"};
}

void reply(httplib::Response& res, const Json& json, int code) {
  res.status = code;
  res.set_content(dump(json) + "\n", "application/json; charset=utf-8");
}

void reply(httplib::Response& res, const ApiError& error) {
  res.status = error.http_code;
  if (error.http_code == 429) res.set_header("Retry-After", "1");
  res.set_content(to_json(error) + "\n", "application/json; charset=utf-8");
}

void reply(httplib::Response& res, const ApiError& error, Json (*words)(const ApiError&)) {
  reply(res, error);
  res.set_content(dump(words(error)) + "\n", "application/json; charset=utf-8");
}

bool has_json_body(const httplib::Request& req, ApiError& error) {
  std::string type = req.get_header_value("Content-Type");
  type = type.substr(0, type.find(';'));
  while (!type.empty() && type.back() == ' ') type.pop_back();
  for (char& c : type) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (type.empty() || type == "application/json") return true;
  error = http_error(415, reason_of(415));
  return false;
}

HttpServer::Impl::Impl(const HttpOptions& o, LogSink log) : options(o), sink(std::move(log)) {}

std::string HttpServer::Impl::next_id(const char* prefix) {
  static const uint32_t start = std::random_device()();
  return fmt::format("{}-{:08x}{:06x}", prefix, start, n_id.fetch_add(1));
}

void HttpServer::Impl::log(Json fields) const {
  if (!sink) return;
  Json line = {
      {"time", std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count()}};
  line.update(fields);
  sink(dump(line));
}

void HttpServer::Impl::log_request(const httplib::Request& req, const httplib::Response& res) {
  const double ms =
      req.start_time_ == std::chrono::steady_clock::time_point::min()
          ? 0
          : std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - req.start_time_)
                .count();
  log({{"event", "request"},
       {"method", req.method},
       {"path", req.path},
       {"status", res.status},
       {"client", req.remote_addr},
       {"request_bytes", req.body.size()},
       {"ms", ms}});
}

bool HttpServer::Impl::let_in(const httplib::Request& req) const {
  if (options.api_keys.empty() || is_public(req.path)) return true;
  constexpr std::string_view kBearer = "Bearer ";
  const std::string header = req.get_header_value("Authorization");
  const std::string key = header.compare(0, kBearer.size(), kBearer) == 0 ? header.substr(kBearer.size())
                                                                          : req.get_header_value("X-Api-Key");
  bool found = false;
  for (const std::string& known : options.api_keys) found = equal_in_constant_time(key, known) || found;
  return found;
}

/// Web pages of others may not use the server through their readers' browsers: neither with requests that
/// browsers send without asking (Origin is another), nor from a name that was pointed at this machine (Host).
bool HttpServer::Impl::is_from_foreign_page(const httplib::Request& req) const {
  const std::string host = req.get_header_value("Host");
  const std::string origin = req.get_header_value("Origin");
  const bool known = origin.empty() || origin == "http://" + host || origin == "https://" + host ||
                     origin == options.cors_origin || options.cors_origin == "*";
  if (!known) return true;
  const bool may_be_renamed = is_loopback(options.host) && options.api_keys.empty() && !host.empty();
  return may_be_renamed && !is_loopback(without_port(host));
}

void HttpServer::Impl::allow_cors(const httplib::Request& req, httplib::Response& res) const {
  if (options.cors_origin.empty()) return;
  res.set_header("Access-Control-Allow-Origin", options.cors_origin);
  res.set_header("Vary", "Origin");
  if (req.method != "OPTIONS") return;
  res.set_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS");
  // Clients send headers of their own (x-api-key, anthropic-version, x-stainless-*): the page may, since it
  // is let in.
  const std::string asked = req.get_header_value("Access-Control-Request-Headers");
  const bool plain =
      !asked.empty() && asked.size() <= 2000 && std::all_of(asked.begin(), asked.end(), [](char c) {
        return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_' || c == ',' ||
               c == ' ';
      });
  res.set_header("Access-Control-Allow-Headers", plain ? asked : "Authorization, Content-Type");
  res.set_header("Access-Control-Max-Age", "600");
}

void Listener::get(const std::string& pattern, Handler handler) {
  routes_.push_back({std::regex(pattern), "GET, HEAD"});
  Get(pattern, std::move(handler));
}

void Listener::post(const std::string& pattern, Handler handler) {
  routes_.push_back({std::regex(pattern), "POST"});
  Post(pattern, [this, handle = std::move(handler)](const httplib::Request& req, httplib::Response& res) {
    const std::string encoding = req.get_header_value(kEncoding);
    if (encoding.empty()) return handle(req, res);
    httplib::Request plain = req;
    plain.body.clear();
    ApiError error;
    if (!decode_body(encoding, req.body, max_body_bytes, plain.body, error)) return reply(res, error);
    handle(plain, res);
  });
}

std::string Listener::methods_of(const std::string& path) const {
  std::string all;
  for (const Route& r : routes_) {
    if (!std::regex_match(path, r.path) || all.find(r.methods) != std::string::npos) continue;
    all += (all.empty() ? "" : ", ") + std::string(r.methods);
  }
  return all;
}

void HttpServer::Impl::set_up() {
  // Not httplib's default, SO_REUSEPORT: another process could then listen on our port beside us.
  http.set_socket_options([](socket_t socket) {
    const int yes = 1;
    (void)::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  http.set_payload_max_length(options.max_body_bytes);
  http.max_body_bytes = options.max_body_bytes;
  http.set_keep_alive_timeout(5);
  http.set_pre_routing_handler([this](const httplib::Request& req, httplib::Response& res) {
    allow_cors(req, res);
    res.set_header("X-Content-Type-Options", "nosniff");
    if (req.method == "OPTIONS" && !options.cors_origin.empty()) {
      res.status = 204;
      return httplib::Server::HandlerResponse::Handled;
    }
    if (is_from_foreign_page(req)) {
      reply(res,
            http_error(403, "web pages of other origins may not use this server; --cors-origin lets one in"));
      return httplib::Server::HandlerResponse::Handled;
    }
    if (!let_in(req)) {
      reply(res, http_error(401, "this server asks for an API key: send it as Authorization: Bearer KEY"));
      return httplib::Server::HandlerResponse::Handled;
    }
    if (!ready() && !is_public(req.path)) {
      reply(res, http_error(503, "the model is still being loaded"));
      return httplib::Server::HandlerResponse::Handled;
    }
    return httplib::Server::HandlerResponse::Unhandled;
  });
  http.set_error_handler([this](const httplib::Request& req, httplib::Response& res) {
    // Our own errors have a body already.
    if (!res.body.empty()) return;
    if (res.status == 404) {
      if (const std::string methods = http.methods_of(req.path); !methods.empty()) {
        res.status = 405;
        res.set_header("Allow", methods);
      }
    }
    reply(res, http_error(res.status, reason_of(res.status)));
  });
  http.set_exception_handler(
      [this](const httplib::Request& req, httplib::Response& res, std::exception_ptr thrown) {
        std::string what = "unknown";
        bool memory = false;
        try {
          std::rethrow_exception(thrown);
        } catch (const std::bad_alloc&) {
          memory = true;
        } catch (const std::exception& e) {
          what = e.what();
        } catch (...) {
        }
        log({{"event", "exception"}, {"path", req.path}, {"what", memory ? "out of memory" : what}});
        reply(res, memory ? to_api_error({StatusCode::out_of_memory, "no memory to answer the request"})
                          : http_error(500, "an internal error; the log says more"));
      });
  http.set_logger(
      [this](const httplib::Request& req, const httplib::Response& res) { log_request(req, res); });
  add_generation_routes();
  add_embedding_routes();
  add_dialect_routes();
  add_small_routes();
  add_slot_routes();
}

void Listener::accept_all(const std::function<void(int socket)>& accepted) {
  const int listening = svr_sock_;
  while (svr_sock_ != INVALID_SOCKET) {
    const int socket = ::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
    if (socket >= 0) {
      const int yes = 1;  // a token should not wait for the next
      (void)::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
      accepted(socket);
    } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
      std::this_thread::sleep_for(kNoDescriptor);
    }  // else only that one connection has gone, or close() was called
  }
  ::close(listening);
}

void Listener::close() {
  const int listening = svr_sock_.exchange(INVALID_SOCKET);
  if (listening != INVALID_SOCKET) (void)::shutdown(listening, SHUT_RDWR);  // ends accept4()
}

bool Listener::answer(const Connection& c, SocketStream& stream) {
  const bool last = c.closes || c.n_answered >= kMostRequests;
  bool closed = false;
  const SocketStream::OfThisThread current(stream);
  const bool done = serve_guarded([&] {
    return process_request(stream, c.remote_ip, c.remote_port, "", 0, last, closed,
                           [](httplib::Request& req) {
                             req.headers.erase("Expect");  // the front has seen to it
                             // Not for cpp-httplib, which refuses what it was not built with.
                             const std::string encoding = req.get_header_value("Content-Encoding");
                             req.headers.erase("Content-Encoding");
                             req.headers.erase(kEncoding);
                             if (!encoding.empty()) req.headers.emplace(kEncoding, encoding);
                           });
  });
  return done && !last && !closed && !stream.says_close() && stream.at_end();
}

/// Whether the request's head alone would not refuse it.
bool HttpServer::Impl::wants_body(const RequestFrame& frame) const {
  httplib::Request req;
  req.method = frame.method();
  req.path = frame.path();
  for (const auto& [name, value] : frame.headers()) req.headers.emplace(name, value);
  return ready() && let_in(req) && !is_from_foreign_page(req);
}

bool HttpServer::Impl::start_front() {
  FrontOptions o;
  o.max_waiting = within_descriptors(static_cast<size_t>(options.max_connections));
  o.n_threads = static_cast<size_t>(options.n_generations) + kOtherRequests;
  o.max_at_work = within_descriptors(o.n_threads + o.max_queued);
  o.max_body_bytes = options.max_body_bytes;
  o.max_held_bytes = 4 * options.max_body_bytes;
  o.head_timeout = options.head_timeout;
  o.body_timeout = options.io_timeout;
  o.body_bytes_a_second = SocketStream::kBytesASecond;
  if (!options.cors_origin.empty())
    o.headers_of_refusals =
        fmt::format("Access-Control-Allow-Origin: {}\r\nVary: Origin\r\n", options.cors_origin);
  Front::Hooks hooks;
  hooks.at_once = [](const RequestFrame& frame) {
    return (frame.method() == "GET" || frame.method() == "HEAD") &&
           (frame.path() == "/health" || frame.path() == "/metrics");
  };
  hooks.wants_body = [this](const RequestFrame& frame) { return wants_body(frame); };
  hooks.answer = [this](Connection& c) {
    SocketStream stream(c.fd, std::move(c.request), options.io_timeout, &c.has_writer);
    return http.answer(c, stream);
  };
  hooks.answer_at_once = [this](Connection& c, std::string& reply) {
    SocketStream stream(c.fd, std::move(c.request), &reply);
    return http.answer(c, stream);
  };
  hooks.refused = [this](const Connection& c, const RequestFrame& frame, const ApiError& error) {
    log({{"event", "refused"},
         {"method", frame.method()},
         {"path", frame.path()},
         {"status", error.http_code},
         {"client", c.remote_ip}});
  };
  front = Front::start(o, std::move(hooks));
  if (front == nullptr) return false;
  return true;
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HttpServer::~HttpServer() { (void)stop(std::chrono::milliseconds(0)); }

Result<std::unique_ptr<HttpServer>> HttpServer::start(const HttpOptions& options, LogSink log) {
  auto impl = std::make_unique<Impl>(options, std::move(log));
  impl->set_up();
  impl->port = options.port;
  const bool bound = options.port == 0 ? (impl->port = impl->http.bind_to_any_port(options.host)) > 0
                                       : impl->http.bind_to_port(options.host, options.port);
  if (!bound) {
    return Status(StatusCode::invalid_argument,
                  fmt::format("cannot listen on {} port {}: it is in use, or not an address of this machine",
                              options.host, options.port));
  }
  if (!impl->start_front()) {
    return Status(
        StatusCode::out_of_memory,
        "the system gives no more threads or open files for connections; raise its limits (ulimit)");
  }
  Impl* raw = impl.get();
  impl->thread = std::thread([raw] { raw->http.accept_all([raw](int socket) { raw->front->add(socket); }); });
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

int HttpServer::port() const { return impl_->port; }
Metrics& HttpServer::metrics() { return impl_->metrics; }

void HttpServer::serve(std::shared_ptr<const Model> model, Scheduler* scheduler) {
  impl_->model = std::move(model);
  impl_->scheduler = scheduler;
}

bool HttpServer::stop(std::chrono::milliseconds patience) {
  impl_->stopping = true;
  if (!impl_->thread.joinable()) return true;
  const Clock::time_point end = Clock::now() + patience;
  impl_->front->refuse_new();
  if (Scheduler* scheduler = impl_->scheduler.load()) scheduler->stop(patience);
  // The listener last: cpp-httplib cuts streams as soon as it is closed.
  const bool ended = impl_->front->end(kLastWords, std::max(end, Clock::now() + kLastWords));
  impl_->http.close();
  impl_->thread.join();
  return ended;
}

}  // namespace narrows::server
