#include "server/front.h"

#include <fmt/format.h>
#include <netdb.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <system_error>

namespace narrows::server {

namespace {

constexpr size_t kPiece = size_t{64} << 10;
constexpr int kPiecesATurn = 4;  // so that a fast sender leaves others their turn
constexpr int kTick_ms = 100;
/// A closing connection's unread bytes are thrown away for so long, and so many: to close before would
/// destroy the answer that is on its way.
constexpr std::chrono::milliseconds kClosing{1000};
constexpr size_t kMostDiscarded = size_t{8} << 20;
/// Enough for a page; a client that does not read does not fill the machine's memory.
constexpr int kSendBuffer = 256 << 10;

/// For a handler whose connection was cut to notice it.
constexpr std::chrono::milliseconds kCut{500};

ApiError too_many() {
  return http_error(429, "more requests are at work and wait than this server takes; try again later");
}
ApiError ending() { return http_error(503, "the server is shutting down"); }

const char* reason_phrase(int code) {
  switch (code) {
    case 400:
      return "Bad Request";
    case 408:
      return "Request Timeout";
    case 413:
      return "Payload Too Large";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    default:
      return "Service Unavailable";
  }
}

/// What the socket takes at once; true if that is all. A client that reads its answers always has room.
bool send_at_once(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::send(fd, text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n <= 0) return false;
    text.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

}  // namespace

Connection::~Connection() { ::close(fd); }

Front::Front(const FrontOptions& options, Hooks hooks)
    : options_(options),
      hooks_(std::move(hooks)),
      pool_(std::make_unique<HandlerPool>(options.n_threads, options.max_queued)) {}

std::unique_ptr<Front> Front::start(const FrontOptions& options, Hooks hooks) {
  std::unique_ptr<Front> front(new Front(options, std::move(hooks)));
  front->epoll_ = ::epoll_create1(EPOLL_CLOEXEC);
  front->wake_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = front->wake_;
  if (front->epoll_ < 0 || front->wake_ < 0 ||
      ::epoll_ctl(front->epoll_, EPOLL_CTL_ADD, front->wake_, &event) != 0)
    return nullptr;
  try {
    front->thread_ = std::thread([raw = front.get()] { raw->run(); });
  } catch (const std::system_error&) {
    return nullptr;
  }
  return front;
}

Front::~Front() {
  (void)end(std::chrono::milliseconds(0), Clock::now());
  close_all();
  if (wake_ >= 0) ::close(wake_);
  if (epoll_ >= 0) ::close(epoll_);
}

void Front::wake() const {
  const uint64_t one = 1;
  (void)!::write(wake_, &one, sizeof(one));
}

void Front::add(int fd) noexcept {
  try {
    auto c = std::make_shared<Connection>(fd, options_.max_body_bytes);
    fd = -1;  // it is closed with the connection
    (void)::setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &kSendBuffer, sizeof(kSendBuffer));
    sockaddr_storage address{};
    socklen_t size = sizeof(address);
    std::array<char, NI_MAXHOST> host{};
    std::array<char, NI_MAXSERV> port{};
    if (::getpeername(c->fd, reinterpret_cast<sockaddr*>(&address), &size) == 0 &&
        ::getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, host.data(), host.size(),
                      port.data(), port.size(), NI_NUMERICHOST | NI_NUMERICSERV) == 0) {
      c->remote_ip = host.data();
      c->remote_port = std::atoi(port.data());
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (ended_) return;
      arrivals_.push_back(std::move(c));
    }
    wake();
  } catch (...) {  // no memory: this client is not served
    if (fd >= 0) ::close(fd);
  }
}

void Front::refuse_new() {
  refusing_ = true;
  wake();
}

/// Shuts the connections that handlers are at work on: all, or those that are being written to. One that
/// nothing was written to is told why. With the lock.
void Front::cut(bool all) {
  for (const auto& [fd, c] : at_work_) {
    if (!all && !c->has_writer) continue;
    if (!c->has_writer.exchange(true)) send_refusal(fd, ending());
    (void)::shutdown(fd, SHUT_RDWR);
  }
}

bool Front::end(std::chrono::milliseconds patience, Clock::time_point until) {
  refuse_new();
  {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto none = [this] { return at_work_.empty(); };
    if (!none_at_work_.wait_for(lock, patience, none)) cut(false);
    if (!none_at_work_.wait_until(lock, until, none)) cut(true);
    if (!none_at_work_.wait_for(lock, kCut, none)) return false;
  }
  close_all();
  return true;
}

void Front::close_all() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    none_at_work_.wait(lock, [this] { return at_work_.empty(); });
    ended_ = true;
  }
  if (thread_.joinable()) {
    wake();
    thread_.join();
  }
  pool_.reset();
  const std::lock_guard<std::mutex> lock(mutex_);
  arrivals_.clear();
}

void Front::run() {
  std::array<epoll_event, 64> events{};
  while (true) {
    const int timeout = !ready_.empty() ? 0 : waiting_.empty() ? -1 : kTick_ms;
    const int n = ::epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), timeout);
    for (int i = 0; i < n; ++i) {
      const int fd = events[static_cast<size_t>(i)].data.fd;
      if (fd == wake_) {
        uint64_t count = 0;
        (void)!::read(wake_, &count, sizeof(count));
      } else if (const auto found = waiting_.find(fd); found != waiting_.end()) {
        const std::shared_ptr<Connection> c = found->second;
        try {
          receive(*c);
        } catch (...) {  // no memory for this one
          drop(*c);
        }
      }
    }
    std::vector<int> ready;
    ready.swap(ready_);
    for (const int fd : ready) {
      if (const auto found = waiting_.find(fd); found != waiting_.end()) {
        const std::shared_ptr<Connection> c = found->second;
        try {
          advance(*c);
        } catch (...) {
          drop(*c);
        }
      }
    }
    drop_late();
    adopt_arrivals();
    if (refusing_ && !told_) refuse_unfinished();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (ended_) break;
  }
  waiting_.clear();
}

/// New connections, and those that handlers give back.
void Front::adopt_arrivals() {
  std::vector<std::shared_ptr<Connection>> arrivals;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    arrivals.swap(arrivals_);
  }
  for (std::shared_ptr<Connection>& c : arrivals) {
    try {
      adopt(std::move(c));
    } catch (...) {  // no memory: it is closed
    }
  }
}

void Front::adopt(std::shared_ptr<Connection> c) {
  hold(*c, c->in.size());
  while (waiting_.size() >= options_.max_waiting) drop_oldest();
  Connection& it = *c;
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = it.fd;
  waiting_.emplace(it.fd, std::move(c));
  if (::epoll_ctl(epoll_, EPOLL_CTL_ADD, it.fd, &event) != 0) return drop(it);
  if (it.phase == Connection::Phase::closing) return begin_closing(it);
  next_request(it);
}

/// The connection waits for a request, which may be there already.
void Front::next_request(Connection& c) {
  c.phase = Connection::Phase::idle;
  c.frame = RequestFrame(options_.max_body_bytes);
  c.since = Clock::now();
  c.deadline = c.since + (c.n_answered > 0 ? options_.idle_timeout : options_.head_timeout);
  if (!c.in.empty() || c.ended) ready_.push_back(c.fd);
}

void Front::hold(Connection& c, size_t n_bytes) {
  n_held_ += n_bytes - c.n_held;
  c.n_held = n_bytes;
}

void Front::receive(Connection& c) {
  // What is there already is looked at first: requests that come faster than answers go do not pile up.
  if (c.phase == Connection::Phase::idle && !c.in.empty()) return;
  std::array<char, kPiece> piece;
  for (int i = 0; i < kPiecesATurn; ++i) {
    const ssize_t n = ::recv(c.fd, piece.data(), piece.size(), MSG_DONTWAIT);
    if (n < 0) {
      if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) break;
      return drop(c);
    }
    if (n == 0) {
      if (c.phase == Connection::Phase::closing) return drop(c);
      c.ended = true;
      break;
    }
    if (c.phase == Connection::Phase::closing) {
      c.n_discarded += static_cast<size_t>(n);
      if (c.n_discarded > kMostDiscarded) return drop(c);
      continue;
    }
    c.in.append(piece.data(), static_cast<size_t>(n));
    hold(c, c.n_held + static_cast<size_t>(n));
    if (n_held_ > options_.max_held_bytes && hold_no_more(c)) return;
    if (static_cast<size_t>(n) < piece.size()) break;
  }
  if (c.phase != Connection::Phase::closing) advance(c);
}

/// Looks at what is there of the request.
void Front::advance(Connection& c) {
  if (c.in.empty()) {
    if (c.ended) drop(c);
    return;
  }
  if (c.phase == Connection::Phase::idle) {
    c.phase = Connection::Phase::request;
    c.since = Clock::now();
    c.deadline = c.since + options_.head_timeout;
  }
  switch (c.frame.look(c.in)) {
    case RequestFrame::State::head:
      if (c.ended) dispatch(c, c.in.size(), true);
      return;
    case RequestFrame::State::body:
      return wait_for_body(c);
    case RequestFrame::State::whole:
      return dispatch(c, c.frame.end(), false);
    case RequestFrame::State::odd:
      return refuse(c, http_error(400, "the request is no well-formed HTTP"));
    case RequestFrame::State::head_too_large:
      return refuse(c, http_error(431, "the headers are larger than this server takes"));
    case RequestFrame::State::body_too_large:
      if (!hooks_.wants_body(c.frame)) return dispatch(c, c.in.size(), true);
      return refuse(c, http_error(413, "the body is larger than this server takes"));
  }
}

void Front::wait_for_body(Connection& c) {
  if (c.ended) return dispatch(c, c.in.size(), true);
  if (c.phase == Connection::Phase::request) {
    c.phase = Connection::Phase::body;
    if (refusing_ || !hooks_.wants_body(c.frame)) return dispatch(c, c.in.size(), true);
    if (c.frame.expects_continue()) (void)send_at_once(c.fd, "HTTP/1.1 100 Continue\r\n\r\n");
    c.since = Clock::now();
  }
  const auto more = std::chrono::seconds(c.in.size() / options_.body_bytes_a_second);
  c.deadline = c.since + options_.body_timeout + more;
}

size_t Front::n_at_work() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return at_work_.size();
}

/// Gives the first n_bytes to a handler.
void Front::dispatch(Connection& c, size_t n_bytes, bool closes) {
  c.closes = closes || refusing_;
  if (hooks_.at_once(c.frame)) {
    c.request = c.in.substr(0, n_bytes);
    c.in.erase(0, n_bytes);
    return answer_at_once(c);
  }
  if (refusing_) return refuse(c, ending());
  if (n_at_work() >= options_.max_at_work) return refuse(c, too_many());
  std::string rest = c.in.substr(n_bytes);
  c.in.resize(n_bytes);
  c.request = std::move(c.in);
  c.in = std::move(rest);
  ++c.n_answered;
  const std::shared_ptr<Connection> own = waiting_.at(c.fd);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    c.has_writer = false;
    at_work_.emplace(c.fd, &c);
  }
  (void)::epoll_ctl(epoll_, EPOLL_CTL_DEL, c.fd, nullptr);
  waiting_.erase(c.fd);
  const bool taken = pool_->run([this, own] {
    bool goes_on = false;
    try {
      goes_on = hooks_.answer(*own);
    } catch (...) {  // the connection is closed, which is all that can be said
    }
    give_back(own, goes_on);
  });
  if (taken) return;
  refuse(c, too_many());
  give_back(own, false);
}

/// The handler is done with it.
void Front::give_back(const std::shared_ptr<Connection>& c, bool goes_on) {
  c->request = {};
  if (!goes_on || c->closes) c->phase = Connection::Phase::closing;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    at_work_.erase(c->fd);
    arrivals_.push_back(c);
    if (at_work_.empty()) none_at_work_.notify_all();
  }
  wake();
}

void Front::answer_at_once(Connection& c) {
  ++c.n_answered;
  std::string reply;
  const bool goes_on = hooks_.answer_at_once(c, reply) && !c.closes;
  c.request = {};
  hold(c, c.in.size());
  if (send_at_once(c.fd, reply) && goes_on) {
    next_request(c);
  } else {
    begin_closing(c);
  }
}

/// What is left of a request that comes now would be refused when it is there.
void Front::refuse_unfinished() {
  told_ = true;
  std::vector<std::shared_ptr<Connection>> unfinished;
  for (const auto& [fd, c] : waiting_) {
    const bool begun = c->phase == Connection::Phase::request || c->phase == Connection::Phase::body;
    if (begun && !hooks_.at_once(c->frame)) unfinished.push_back(c);
  }
  for (const std::shared_ptr<Connection>& c : unfinished) refuse(*c, ending());
}

void Front::send_refusal(int fd, const ApiError& error) const {
  const std::string body = to_json(error) + "\n";
  (void)send_at_once(
      fd,
      fmt::format("HTTP/1.1 {} {}\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {}\r\n"
                  "X-Content-Type-Options: nosniff\r\n{}{}Connection: close\r\n\r\n{}",
                  error.http_code, reason_phrase(error.http_code), body.size(), options_.headers_of_refusals,
                  error.http_code == 429 ? "Retry-After: 1\r\n" : "", body));
}

void Front::refuse(Connection& c, const ApiError& error) {
  send_refusal(c.fd, error);
  hooks_.refused(c, c.frame, error);
  begin_closing(c);
}

/// Our side is closed; what the client still sends is thrown away for a moment.
void Front::begin_closing(Connection& c) {
  (void)::shutdown(c.fd, SHUT_WR);
  hold(c, 0);
  c.in = {};
  c.request = {};
  c.phase = Connection::Phase::closing;
  c.since = Clock::now();
  c.deadline = c.since + kClosing;
  if (c.ended) drop(c);
}

void Front::drop(Connection& c) {
  hold(c, 0);
  waiting_.erase(c.fd);  // closed when the last one has let go of it
}

void Front::drop_late() {
  const Clock::time_point now = Clock::now();
  std::vector<std::shared_ptr<Connection>> late;
  for (const auto& [fd, c] : waiting_) {
    if (now >= c->deadline) late.push_back(c);
  }
  for (const std::shared_ptr<Connection>& c : late) {
    if (c->phase == Connection::Phase::request || c->phase == Connection::Phase::body) {
      refuse(*c, http_error(408, "the request took too long to come"));
    } else {
      drop(*c);
    }
  }
}

/// Room for a new connection: the one that has waited longest goes.
void Front::drop_oldest() {
  const auto oldest = std::min_element(waiting_.begin(), waiting_.end(), [](const auto& a, const auto& b) {
    return a.second->since < b.second->since;
  });
  if (oldest == waiting_.end()) return;
  const std::shared_ptr<Connection> c = oldest->second;
  drop(*c);
}

/// All requests together have grown too large with c's last bytes: the one goes that has been on its way for
/// longest. True if that is c.
bool Front::hold_no_more(Connection& c) {
  while (n_held_ > options_.max_held_bytes) {
    std::shared_ptr<Connection> oldest;
    for (const auto& [fd, other] : waiting_) {
      if (!other->in.empty() && (oldest == nullptr || other->since < oldest->since)) oldest = other;
    }
    if (oldest == nullptr) return false;
    refuse(*oldest, http_error(429, "the bodies of all requests are more than this server holds; try later"));
    if (oldest.get() == &c) return true;
  }
  return false;
}

}  // namespace narrows::server
