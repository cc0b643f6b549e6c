// A server over real sockets on a tiny model, and clients that do what proper ones do not.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <locale>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "server/http_server.h"
#include "support/session.h"

namespace narrows::server {

/// libstdc++ fills a table of its locale at first use, without a lock, and std::regex reads it in each client
/// of httplib: filled before there are threads.
inline const bool kLocaleIsReady = [] {
  const auto& type = std::use_facet<std::ctype<char>>(std::locale());
  for (int c = 0; c < 256; ++c) type.narrow(static_cast<char>(c), '\0');
  return true;
}();

using narrows::testing::LoadedTiny;
using narrows::testing::TinyModel;
using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;

inline const LoadedTiny& tiny() {
  static const LoadedTiny loaded([] {
    TinyModel m;
    m.n_layer = 4;
    m.n_ctx = 8192;
    return m;
  }());
  return loaded;
}

class Served {
 public:
  explicit Served(HttpOptions http = {}, int n_slots = 2, int n_queue = 64, int64_t memory_bytes = 0)
      : Served(tiny(), std::move(http), n_slots, n_queue, memory_bytes) {}
  explicit Served(const LoadedTiny& loaded, HttpOptions http = {}, int n_slots = 2, int n_queue = 64,
                  int64_t memory_bytes = 0)
      : loaded_(loaded) {
    http.port = 0;
    http.model_name = "tiny";
    http.n_generations = n_slots + n_queue;
    auto started = HttpServer::start(http, [this](const std::string& line) {
      const std::lock_guard<std::mutex> lock(mutex_);
      log_ += line + "\n";
    });
    if (!started.ok()) {
      ADD_FAILURE() << started.status().message();
      std::abort();
    }
    server_ = std::move(*started);
    options_.n_slots = n_slots;
    options_.max_waiting = n_queue;
    options_.memory_bytes = memory_bytes;
  }
  void load() {
    options_.session.kv = narrows::testing::kv("klt");
    options_.session.n_threads = 2;
    auto made = Scheduler::create(loaded_.model, options_, &server_->metrics());
    ASSERT_TRUE(made.ok()) << made.status().message();
    scheduler_ = std::move(*made);
    server_->serve(loaded_.model, scheduler_.get());
  }
  HttpServer& server() { return *server_; }
  Scheduler& scheduler() { return *scheduler_; }
  std::string log() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return log_;
  }
  httplib::Client client() const {
    httplib::Client c("127.0.0.1", server_->port());
    c.set_read_timeout(60);
    return c;
  }
  int n_busy() const {
    int n = 0;
    for (const SlotInfo& slot : scheduler_->slots()) n += slot.state != SlotState::idle ? 1 : 0;
    return n;
  }
  /// True once it has come true within the seconds.
  template <typename F>
  static bool comes(F what, double seconds) {
    const auto begin = Clock::now();
    while (!what()) {
      if (seconds_since(begin) > seconds) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return true;
  }

 private:
  const LoadedTiny& loaded_;
  std::mutex mutex_;
  std::string log_;
  SchedulerOptions options_;
  std::unique_ptr<Scheduler> scheduler_;  // after the server's threads have ended
  std::unique_ptr<HttpServer> server_;
};

/// A client of bytes.
class Raw {
 public:
  explicit Raw(int port, int receive_buffer = 0) : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    if (receive_buffer > 0)
      (void)::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<uint16_t>(port));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = ::connect(fd_, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) == 0;
  }
  ~Raw() { close(); }
  Raw(Raw&& other) noexcept : fd_(other.fd_), connected_(other.connected_) { other.fd_ = -1; }
  Raw(const Raw&) = delete;
  Raw& operator=(const Raw&) = delete;
  Raw& operator=(Raw&&) = delete;

  bool connected() const { return connected_; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  bool send(const std::string& text) const {
    return ::send(fd_, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size());
  }
  /// What comes until the server closes, `until` was in it, or the seconds are over (then "..." ends it).
  std::string read(const std::string& until = "", double seconds = 20) const {
    std::string text;
    const auto begin = Clock::now();
    while (until.empty() || text.find(until) == std::string::npos) {
      const double left = seconds - seconds_since(begin);
      pollfd look{fd_, POLLIN, 0};
      if (left <= 0 || ::poll(&look, 1, static_cast<int>(left * 1000) + 1) <= 0) return text + "...";
      char piece[4096];
      const ssize_t n = ::recv(fd_, piece, sizeof(piece), 0);
      if (n <= 0) return text;
      text.append(piece, static_cast<size_t>(n));
    }
    return text;
  }

 private:
  int fd_;
  bool connected_ = false;
};

/// A POST as bytes.
inline std::string post(const std::string& path, const std::string& body, const std::string& headers = "") {
  return "POST " + path + " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + headers +
         "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}
inline std::string get(const std::string& path) {
  return "GET " + path + " HTTP/1.1\r\nHost: localhost\r\n\r\n";
}

inline constexpr const char* kJson = "application/json";
inline constexpr const char* kChat = "/v1/chat/completions";

inline json body_of(const httplib::Result& r) {
  EXPECT_TRUE(r) << httplib::to_string(r.error());
  return r ? json::parse(r->body, nullptr, false) : json();
}

inline std::string chat_body(const std::string& fields = "", const std::string& content = "hello") {
  json body = {{"messages", {{{"role", "user"}, {"content", content}}}},
               {"temperature", 0},
               {"ignore_eos", true},
               {"max_tokens", 8}};
  body.update(json::parse("{" + fields + "}"));
  return body.dump();
}

/// The JSON of all events of a stream; "[DONE]" as a string.
inline std::vector<json> events_of(const std::string& body) {
  std::vector<json> events;
  std::istringstream lines(body);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("data: ", 0) != 0) continue;
    const std::string data = line.substr(6);
    events.push_back(data == "[DONE]" ? json(data) : json::parse(data));
  }
  return events;
}

}  // namespace narrows::server
