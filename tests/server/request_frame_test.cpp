// Where requests end, however they come; and the threads that answer them.
#include "server/request_frame.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>

#include "server/handler_pool.h"
#include "server/job.h"

namespace narrows::server {
namespace {

using State = RequestFrame::State;
constexpr size_t kMaxBody = 1000;

/// The state after the text has come in pieces of n bytes, and where the request ends.
std::pair<State, size_t> look(const std::string& text, size_t n = 1) {
  RequestFrame frame(kMaxBody);
  State state = State::head;
  for (size_t at = 0; at < text.size() && (state == State::head || state == State::body);) {
    at = std::min(at + n, text.size());
    state = frame.look(std::string_view(text).substr(0, at));
  }
  return {state, frame.end()};
}

// docs/server_api.md: "A request goes to a thread when all of it is there"
TEST(RequestFrame, FindsTheEndInPiecesOfAnySize) {
  const std::string get = "GET /health?x=1 HTTP/1.1\r\nHost: a\r\n\r\n";
  const std::string with_length = "POST /p HTTP/1.1\r\ncontent-LENGTH:  5 \r\n\r\nhello";
  const std::string chunked =
      "POST /p HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n"
      "5\r\nhello\r\nA;x=y\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n";
  const std::string no_trailer = "POST /p HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n";
  for (const std::string& text : {get, with_length, chunked, no_trailer}) {
    for (size_t n = 1; n <= text.size() + 20; ++n) {
      const auto [state, end] = look(text + "GET / HTTP/1.1\r\n", n);
      EXPECT_EQ(state, State::whole) << text << n;
      EXPECT_EQ(end, text.size()) << text << n;
    }
    for (size_t cut = 0; cut < text.size(); ++cut) {
      const State state = look(text.substr(0, cut), 7).first;
      EXPECT_TRUE(state == State::head || state == State::body) << text << cut;
    }
  }
}

TEST(RequestFrame, TellsTheHead) {
  RequestFrame frame(kMaxBody);
  EXPECT_EQ(frame.look("POST /a/b?c=d HTTP/1.1\r\nExpect: 100-Continue\r\nX-Key:  v \r\nno field\r\n"
                       "Content-Length: 1\r\n\r\n"),
            State::body);
  EXPECT_EQ(frame.method(), "POST");
  EXPECT_EQ(frame.path(), "/a/b");
  EXPECT_TRUE(frame.expects_continue());
  ASSERT_EQ(frame.headers().size(), 3U);
  EXPECT_EQ(frame.headers()[1].first, "x-key");
  EXPECT_EQ(frame.headers()[1].second, "v");
}

// docs/server_api.md: "Heads are at most 64 KB."
TEST(RequestFrame, WhatCannotBeFollowed) {
  const std::string post = "POST / HTTP/1.1\r\n";
  for (const char* field :
       {"Content-Length: x", "Content-Length:", "Content-Length: -1", "Content-Length: 1, 1",
        "Content-Length: 99999999999999999999", "Content-Length: 1\r\nContent-Length: 2",
        "Content-Length: 0x5", "Transfer-Encoding: gzip", "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 1",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked, chunked",
        "Host: localhost\r\nHost: localhost", "Host: a\r\nX: y\r\nhost:b"})
    EXPECT_EQ(look(post + field + "\r\n\r\n").first, State::odd) << field;
  const std::string chunked = post + "Transfer-Encoding: chunked\r\n\r\n";
  for (const std::string& body :
       {std::string("x\r\n"), std::string("\r\n"), std::string("-1\r\n"),
        std::string("fffffffffffffffff\r\n"), std::string(2000, '0'), "0\r\n" + std::string(9000, 'a')})
    EXPECT_EQ(look(chunked + body, 100).first, State::odd) << body.substr(0, 20);
  EXPECT_EQ(look(std::string(RequestFrame::kMaxHead + 1, 'a'), 1000).first, State::head_too_large);
  EXPECT_EQ(look(post + "X: " + std::string(RequestFrame::kMaxHead, 'a') + "\r\n\r\n", 1000).first,
            State::head_too_large);
  EXPECT_EQ(look(post + "X: " + std::string(8188, 'a') + "\r\n\r\n", 1000).first, State::head_too_large);
  EXPECT_EQ(look(post + "X: " + std::string(8187, 'a') + "\r\n\r\n", 1000).first, State::whole);
  std::string fields;
  for (int i = 0; i < 100; ++i) fields += "A: b\r\n";
  EXPECT_EQ(look(post + fields + "\r\n", 100).first, State::whole);
  EXPECT_EQ(look(post + fields + "A: b\r\n\r\n", 100).first, State::head_too_large);
  EXPECT_EQ(look(post + "Content-Length: 1001\r\n\r\n").first, State::body_too_large);
  EXPECT_EQ(look(post + "Content-Length: 1000\r\n\r\n").first, State::body);
  EXPECT_EQ(look(chunked + "3e9\r\n").first, State::body_too_large);
  EXPECT_EQ(look(chunked + "3e8\r\n" + std::string(1000, 'a') + "\r\n1\r\n").first, State::body_too_large);
  EXPECT_EQ(look(chunked + "ffffffffffffffff\r\n").first, State::body_too_large);
}

// docs/server_api.md: "generations have one each, and 16 other requests"
TEST(HandlerPool, EveryJobHasAThreadUpToTheBound) {
  std::promise<void> release;
  const std::shared_future<void> released = release.get_future().share();
  std::atomic<int> n_begun{0}, n_done{0};
  {
    HandlerPool pool(5, 2);
    const auto job = [&] {
      ++n_begun;
      released.wait();
      ++n_done;
    };
    for (int i = 0; i < 5; ++i) EXPECT_TRUE(pool.run(job));
    const auto begin = Clock::now();
    while (n_begun < 5 && seconds_since(begin) < 20) std::this_thread::yield();
    EXPECT_EQ(n_begun, 5);  // all at a time: none waits for another
    EXPECT_TRUE(pool.run(job));
    EXPECT_TRUE(pool.run(job));
    EXPECT_FALSE(pool.run(job));
    release.set_value();
  }
  EXPECT_EQ(n_done, 7);
}

// docs/server_api.md: "8 MB of an answer that nobody reads end it"
TEST(Channel, WhatIsNotReadIsBounded) {
  Channel channel;
  Event event;
  event.text = std::string(1000, 'a');
  size_t n = 0;
  while (!channel.cancelled() && n < 100'000) {
    channel.push(event);
    ++n;
  }
  EXPECT_TRUE(channel.cancelled());
  EXPECT_LE(n * 1000, Channel::kMostBytes);
  for (int i = 0; i < 100; ++i) channel.push(event);
  size_t n_read = 0;
  while (auto got = channel.pop(std::chrono::milliseconds(0))) {
    ++n_read;
    if (got->kind == Event::Kind::failed) {
      EXPECT_EQ(got->error.http_code, 408);
    }
  }
  EXPECT_EQ(n_read, n);  // the last one is the failure

  Channel read;
  for (int i = 0; i < 100'000; ++i) {
    read.push(event);
    EXPECT_TRUE(read.pop(std::chrono::milliseconds(0)));
  }
  EXPECT_FALSE(read.cancelled());
}

}  // namespace
}  // namespace narrows::server
