// The front of the server: one thread that holds all connections which wait for something, reads requests as
// they come, and gives whole ones to handlers. A client that is silent or slow costs a descriptor and what
// it has sent, never a thread.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "server/api_error.h"
#include "server/handler_pool.h"
#include "server/job.h"
#include "server/request_frame.h"

namespace narrows::server {

struct FrontOptions {
  size_t max_waiting = 256;                   ///< connections without a request that is answered
  size_t n_threads = 84;                      ///< requests that are answered at a time
  size_t max_queued = 64;                     ///< whole requests that wait for a thread
  size_t max_at_work = 148;                   ///< both together, of which each keeps a descriptor
  size_t max_body_bytes = size_t{64} << 20;   ///< of one request
  size_t max_held_bytes = size_t{256} << 20;  ///< of all requests that are here or answered
  std::chrono::milliseconds head_timeout{
      10'000};  ///< from the first byte (or the connection) to the head's end
  std::chrono::milliseconds body_timeout{30'000};  ///< from there to the body's end, and 1 s more ...
  size_t body_bytes_a_second = 100'000;            ///< ... for so many bytes that came
  std::chrono::milliseconds idle_timeout{5'000};   ///< between requests of a connection
  std::string headers_of_refusals;                 ///< lines with \r\n, for what the front refuses itself
};

struct Connection {
  explicit Connection(int fd_of, size_t max_body) : fd(fd_of), frame(max_body) {}
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  int fd;
  std::string remote_ip;
  int remote_port = 0;
  std::string request;  ///< for the handler: one whole request, or all there is
  bool closes = false;  ///< after this request
  int n_answered = 0;
  /// Who writes to the socket while a handler is at work: the handler from its first byte on, or the front,
  /// which then ends it.
  std::atomic<bool> has_writer{false};

 private:
  friend class Front;
  enum class Phase { idle, request, body, closing };
  Phase phase = Phase::idle;
  std::string in;  ///< came, not given to a handler
  RequestFrame frame;
  bool ended = false;       ///< the client sends no more
  Clock::time_point since;  ///< when it began to wait for what it waits for
  Clock::time_point deadline;
  size_t n_held = 0;  ///< bytes that count as held
  size_t n_discarded = 0;
};

class Front {
 public:
  struct Hooks {
    /// On a thread of the pool: answers connection.request over its socket. True: the connection may go on.
    std::function<bool(Connection&)> answer;
    /// On the front's thread: the same for what at_once() is true of, into `reply`; must not wait.
    std::function<bool(Connection&, std::string& reply)> answer_at_once;
    std::function<bool(const RequestFrame&)> at_once;
    /// Whether a request with this head will get as far as its body: else the body is not waited for.
    std::function<bool(const RequestFrame&)> wants_body;
    /// A request was refused here.
    std::function<void(const Connection&, const RequestFrame&, const ApiError&)> refused;
  };

  /// Null if the system gives no descriptors or thread.
  static std::unique_ptr<Front> start(const FrontOptions& options, Hooks hooks);
  /// As end() without patience; waits for all handlers.
  ~Front();
  Front(const Front&) = delete;
  Front& operator=(const Front&) = delete;

  /// Takes the socket of a new connection. From any thread.
  void add(int fd) noexcept;

  /// From now on all requests but those that are answered at once are refused, and those that are not whole
  /// yet.
  void refuse_new();
  /// Cuts clients that do not take what is written to them within `patience`; at `until` those whose answer
  /// has not begun get 503. Then closes everything. After refuse_new(). False if a handler is still at
  /// work, on something that cannot be interrupted: only the destructor waits for it.
  bool end(std::chrono::milliseconds patience, Clock::time_point until);

 private:
  Front(const FrontOptions& options, Hooks hooks);

  void run();
  void adopt_arrivals();
  void adopt(std::shared_ptr<Connection> c);
  void receive(Connection& c);
  void advance(Connection& c);
  void wait_for_body(Connection& c);
  void dispatch(Connection& c, size_t n_bytes, bool closes);
  void answer_at_once(Connection& c);
  void next_request(Connection& c);
  void refuse_unfinished();
  void refuse(Connection& c, const ApiError& error);
  void send_refusal(int fd, const ApiError& error) const;
  void cut(bool all);
  void close_all();
  void begin_closing(Connection& c);
  void drop(Connection& c);
  void drop_late();
  void drop_oldest();
  void hold(Connection& c, size_t n_bytes);
  bool hold_no_more(Connection& c);
  size_t n_at_work();
  void give_back(const std::shared_ptr<Connection>& c, bool goes_on);
  void wake() const;

  const FrontOptions options_;
  const Hooks hooks_;
  int epoll_ = -1;
  int wake_ = -1;

  // Of the front's thread.
  std::unordered_map<int, std::shared_ptr<Connection>> waiting_;
  std::vector<int> ready_;  ///< connections whose next request may be there already
  size_t n_held_ = 0;
  bool told_ = false;  ///< unfinished requests that they are refused

  std::atomic<bool> refusing_{false};
  std::mutex mutex_;  ///< of what follows
  std::condition_variable none_at_work_;
  std::vector<std::shared_ptr<Connection>> arrivals_;
  std::unordered_map<int, Connection*> at_work_;
  bool ended_ = false;

  std::unique_ptr<HandlerPool> pool_;
  std::thread thread_;
};

}  // namespace narrows::server
