// Where one HTTP request ends among the bytes of a connection: found as they come, so that no thread waits
// for the rest. Only the framing is read here; the parser proper (cpp-httplib) gets the whole request after.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace narrows::server {

class RequestFrame {
 public:
  enum class State {
    head,            ///< the head is not there yet
    body,            ///< the head is there, the body is not
    whole,           ///< end() bytes are one request
    odd,             ///< no framing that all would follow alike: refuse it and close
    head_too_large,  ///< more than kMaxHead bytes, kMaxLine bytes of a line, kMaxFields lines
    body_too_large,  ///< it says that it is longer than max_body, or is
  };
  static constexpr size_t kMaxHead = size_t{64} << 10;
  static constexpr size_t kMaxLine = 8190;   ///< without its end; what the parser takes
  static constexpr size_t kMaxFields = 100;  ///< of them too

  explicit RequestFrame(size_t max_body) : max_body_(max_body) {}

  /// `bytes`: all that came since the request's begin; never fewer than at the last call.
  State look(std::string_view bytes);

  /// Valid once the head is there.
  size_t end() const { return end_; }
  const std::string& method() const { return method_; }
  const std::string& path() const { return path_; }  ///< without the query, not decoded
  /// Names in lower case.
  const std::vector<std::pair<std::string, std::string>>& headers() const { return headers_; }
  /// The client waits for "100 Continue" before it sends the body.
  bool expects_continue() const { return expects_continue_; }

 private:
  State read_head(std::string_view head);
  State look_for_chunks(std::string_view bytes);
  State look_for_trailer(std::string_view bytes);

  size_t max_body_;
  State state_ = State::head;
  size_t seen_ = 0;  ///< bytes that hold no end of the head
  size_t end_ = 0;   ///< of the request if its length is known, else of the part that was understood
  bool chunked_ = false;
  bool trailer_ = false;    ///< the last chunk was seen
  size_t chunk_bytes_ = 0;  ///< of chunks up to end_
  std::string method_, path_;
  std::vector<std::pair<std::string, std::string>> headers_;
  bool expects_continue_ = false;
};

}  // namespace narrows::server
