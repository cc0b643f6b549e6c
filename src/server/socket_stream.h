// What cpp-httplib reads a request from and writes its reply to: a request that is in memory already, and a
// socket whose client has to read, or nothing that waits at all.
#pragma once

#include <httplib.h>

#include <atomic>
#include <chrono>
#include <string>

#include "server/job.h"

namespace narrows::server {

class SocketStream : public httplib::Stream {
 public:
  /// Takes the request; reads end with it. Writes go to the socket: one that the client does not take within
  /// write_timeout, and 1 s more for each kBytesASecond of it, fails.
  /// The first one sets *has_writer; if that is set already, somebody else has answered, and it fails.
  SocketStream(int fd, std::string request, std::chrono::milliseconds write_timeout,
               std::atomic<bool>* has_writer)
      : fd_(fd), request_(std::move(request)), has_writer_(has_writer), write_timeout_(write_timeout) {}
  /// The same, but writes go to *reply.
  SocketStream(int fd, std::string request, std::string* reply)
      : fd_(fd), request_(std::move(request)), reply_(reply) {}

  static constexpr size_t kBytesASecond = 100'000;

  /// The reply says that the connection ends with it.
  bool says_close() const { return says_close_; }
  /// All of the request was read.
  bool at_end() const { return at_ == request_.size(); }

  /// The client has closed its side for writing; it may still read (`nc -N`, some proxies), or be gone: only
  /// a byte that is sent to it tells.
  bool peer_sends_no_more() const;
  /// The connection is closed or reset. A client that sends no more is asked now and then, if may_ask and
  /// nothing of the reply is written yet: by an interim reply, which HTTP/1.1 lets it ignore.
  bool has_left(bool may_ask);

  /// The stream that this thread answers, null if none: cpp-httplib tells handlers nothing of it, and calls
  /// every half-closed connection closed.
  static SocketStream* of_this_thread() { return current_; }
  class OfThisThread {
   public:
    explicit OfThisThread(SocketStream& stream) { current_ = &stream; }
    ~OfThisThread() { current_ = nullptr; }
    OfThisThread(const OfThisThread&) = delete;
    OfThisThread& operator=(const OfThisThread&) = delete;
  };

  bool is_readable() const override { return !at_end(); }
  bool wait_readable() const override { return !at_end(); }
  bool wait_writable() const override;
  bool is_peer_alive() const override;
  ssize_t read(char* to, size_t size) override;
  ssize_t write(const char* from, size_t size) override;
  void get_remote_ip_and_port(std::string& ip, int& port) const override;
  void get_local_ip_and_port(std::string& ip, int& port) const override;
  socket_t socket() const override { return fd_; }
  time_t duration() const override { return 0; }
  const char* buffered_data(size_t& size) const override;
  void consume_buffered(size_t size) override;

 private:
  static constexpr std::chrono::milliseconds kAnswer{
      10};                                             ///< of this machine; others' is seen at the next look
  static constexpr std::chrono::seconds kAskAgain{2};  ///< then four times as much, each time
  static constexpr int kMostAsked = 5;                 ///< interim replies that all clients bear

  static thread_local SocketStream* current_;

  bool wait_for(short events, std::chrono::milliseconds most) const;

  int fd_;
  std::string request_;
  size_t at_ = 0;
  std::string* reply_ = nullptr;
  std::atomic<bool>* has_writer_ = nullptr;
  std::chrono::milliseconds write_timeout_{0};
  bool wrote_ = false;
  bool says_close_ = false;
  int n_asked_ = 0;
  Clock::time_point ask_again_;
};

}  // namespace narrows::server
