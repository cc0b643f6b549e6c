#include "server/socket_stream.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>

namespace narrows::server {

thread_local SocketStream* SocketStream::current_ = nullptr;

bool SocketStream::wait_for(short events, std::chrono::milliseconds most) const {
  const Clock::time_point end = Clock::now() + most;
  while (true) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
    pollfd look{fd_, events, 0};
    const int n = ::poll(&look, 1, static_cast<int>(std::max<int64_t>(left.count(), 0)));
    if (n > 0) return true;
    if (n == 0 || errno != EINTR) return false;
  }
}

bool SocketStream::wait_writable() const { return reply_ != nullptr || wait_for(POLLOUT, write_timeout_); }

bool SocketStream::is_peer_alive() const {
  if (reply_ != nullptr) return true;
  pollfd look{fd_, 0, 0};  // a reset or a closed connection is always told
  const int n = ::poll(&look, 1, 0);
  return n < 0 || (look.revents & (POLLHUP | POLLERR | POLLNVAL)) == 0;
}

bool SocketStream::peer_sends_no_more() const {
  if (reply_ != nullptr) return false;
  pollfd look{fd_, POLLRDHUP, 0};
  return ::poll(&look, 1, 0) > 0 && (look.revents & POLLRDHUP) != 0;
}

bool SocketStream::has_left(bool may_ask) {
  if (!is_peer_alive()) return true;
  if (!may_ask || wrote_ || n_asked_ >= kMostAsked || !peer_sends_no_more() || Clock::now() < ask_again_)
    return false;
  ask_again_ = Clock::now() + kAskAgain * (1 << (2 * n_asked_++));
  constexpr std::string_view kInterim = "HTTP/1.1 100 Continue\r\n\r\n";
  (void)::send(fd_, kInterim.data(), kInterim.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  (void)wait_for(0, kAnswer);
  return !is_peer_alive();
}

ssize_t SocketStream::read(char* to, size_t size) {
  const size_t n = std::min(size, request_.size() - at_);
  std::memcpy(to, request_.data() + at_, n);
  consume_buffered(n);
  return static_cast<ssize_t>(n);
}

const char* SocketStream::buffered_data(size_t& size) const {
  size = request_.size() - at_;
  return size > 0 ? request_.data() + at_ : nullptr;
}

void SocketStream::consume_buffered(size_t size) {
  at_ += size;
  if (!at_end()) return;
  std::string().swap(request_);  // a large body is in memory once
  at_ = 0;
}

ssize_t SocketStream::write(const char* from, size_t size) {
  const std::string_view text(from, size);
  if (!wrote_) {  // the first write is the whole head
    if (has_writer_ != nullptr && has_writer_->exchange(true)) {
      error_ = httplib::Error::Write;
      return -1;
    }
    says_close_ =
        text.substr(0, text.find("\r\n\r\n")).find("\r\nConnection: close") != std::string_view::npos;
    wrote_ = true;
  }
  if (reply_ != nullptr) {
    reply_->append(text);
    return static_cast<ssize_t>(size);
  }
  const Clock::time_point end = Clock::now() + write_timeout_ + std::chrono::seconds(size / kBytesASecond);
  for (size_t n_sent = 0; n_sent < size;) {
    const ssize_t n = ::send(fd_, from + n_sent, size - n_sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n >= 0) {
      n_sent += static_cast<size_t>(n);
      continue;
    }
    if (errno == EINTR) continue;
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
    const bool full = errno == EAGAIN || errno == EWOULDBLOCK;
    if (!full || left.count() <= 0 || !wait_for(POLLOUT, left)) {
      error_ = httplib::Error::Write;
      return -1;
    }
  }
  return static_cast<ssize_t>(size);
}

void SocketStream::get_remote_ip_and_port(std::string& ip, int& port) const {
  ip.clear();  // the front knows it
  port = 0;
}

void SocketStream::get_local_ip_and_port(std::string& ip, int& port) const {
  get_remote_ip_and_port(ip, port);
}

}  // namespace narrows::server
