// The end of the server: what is at work finishes or is told, what is new is refused, nothing is cut.
#include "server/served.h"

namespace narrows::server {
namespace {

using std::chrono::milliseconds;

/// Whole: the last chunk of chunked coding was there.
struct Reply {
  bool whole = false;
  int status = 0;
  std::string body;
};

class InAnotherThread {
 public:
  InAnotherThread(const Served& s, const std::string& body)
      : thread_([this, c = std::make_shared<httplib::Client>("127.0.0.1", port(s)), body] {
          c->set_read_timeout(120);
          const auto r = c->Post(kChat, body, kJson);
          reply_.whole = static_cast<bool>(r);
          if (r) reply_.status = r->status;
          if (r) reply_.body = r->body;
        }) {}
  ~InAnotherThread() {
    if (thread_.joinable()) thread_.join();
  }
  const Reply& reply() {
    if (thread_.joinable()) thread_.join();
    return reply_;
  }

 private:
  static int port(const Served& s) { return s.client().port(); }
  Reply reply_;
  std::thread thread_;
};

/// An answer that is still written when all that is looked at meanwhile has been.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kLong = 600;
#else
constexpr int kLong = 3000;
#endif

// docs/server_api.md: "SIGTERM and SIGINT end the server: ... those at work have 10 seconds"
TEST(Ending, WhatIsAtWorkFinishesAndNewIsRefused) {
  Served s({}, 2);
  s.load();
  InAnotherThread stream(s, chat_body(R"("stream":true,"max_tokens":)" + std::to_string(kLong), "one"));
  InAnotherThread whole(s, chat_body(R"("max_tokens":)" + std::to_string(kLong), "two"));
  ASSERT_TRUE(Served::comes([&] { return s.n_busy() == 2; }, 20));  // so that the third waits
  InAnotherThread waits(s, chat_body(R"("max_tokens":5)", "three"));
  ASSERT_TRUE(Served::comes([&] { return s.server().metrics().requests == 3; }, 20));
  Raw idle(s.server().port());
  std::thread ender([&] { s.server().stop(milliseconds(120'000)); });
  EXPECT_TRUE(Served::comes([&] { return s.client().Get("/health")->status == 503; }, 20));
  const auto health = s.client().Get("/health");
  EXPECT_THAT(health->body, HasSubstr("shutting down"));
  EXPECT_EQ(health->get_header_value("Connection"), "close");
  const auto refused = s.client().Post(kChat, chat_body(), kJson);
  EXPECT_EQ(refused->status, 503);
  EXPECT_EQ(body_of(refused)["error"]["type"], "unavailable_error");
  EXPECT_EQ(refused->get_header_value("Connection"), "close");
  EXPECT_EQ(s.client().Get("/metrics")->status, 200);
  EXPECT_EQ(s.n_busy(), 2);  // all of that while they are at work
  ASSERT_TRUE(stream.reply().whole);
  EXPECT_EQ(events_of(stream.reply().body).back(), "[DONE]");
  EXPECT_EQ(whole.reply().status, 200);
  EXPECT_EQ(json::parse(whole.reply().body)["usage"]["completion_tokens"], kLong);
  EXPECT_EQ(waits.reply().status, 200);
  ender.join();
  EXPECT_FALSE(s.client().Get("/health"));
  EXPECT_EQ(idle.read(), "");
}

// docs/server_api.md: "then the rest gets an error event, or 503 where the answer is no stream"
TEST(Ending, TheRestIsTold) {
  Served s({}, 2);
  s.load();
  InAnotherThread stream(s, chat_body(R"("stream":true,"max_tokens":8000)", "one"));
  InAnotherThread whole(s, chat_body(R"("max_tokens":8000)", "two"));
  ASSERT_TRUE(Served::comes([&] { return s.n_busy() == 2; }, 20));  // so that the others wait
  InAnotherThread waits(s, chat_body(R"("max_tokens":5)", "three"));
  InAnotherThread waiting_stream(s, chat_body(R"("stream":true,"max_tokens":5)", "four"));
  ASSERT_TRUE(Served::comes([&] { return s.server().metrics().requests == 4; }, 20));
  ASSERT_TRUE(Served::comes([&] { return s.server().metrics().generated_tokens > 20; }, 20));
  std::this_thread::sleep_for(milliseconds(200));  // the streams have begun
  s.server().stop(milliseconds(300));
  for (InAnotherThread* one : {&stream, &waiting_stream}) {
    ASSERT_TRUE(one->reply().whole);
    const auto events = events_of(one->reply().body);
    ASSERT_FALSE(events.empty());
    EXPECT_EQ(events.back()["error"]["code"], 503);
    EXPECT_EQ(events.back()["error"]["type"], "unavailable_error");
  }
  for (InAnotherThread* one : {&whole, &waits}) {
    ASSERT_TRUE(one->reply().whole);
    EXPECT_EQ(one->reply().status, 503);
    EXPECT_THAT(json::parse(one->reply().body)["error"]["message"], HasSubstr("shutting down"));
  }
}

// docs/server_api.md: "clients that do not take their last bytes within 2 s are cut"
TEST(Ending, WaitsForNobodyWhoDoesNotRead) {
  Served s({}, 1);
  s.load();
  Raw deaf(s.server().port(), 4096);
  EXPECT_TRUE(deaf.send(
      post(kChat, chat_body(R"("stream":true,"max_tokens":8000,"logprobs":true,"top_logprobs":20)"))));
  Raw half(s.server().port());
  EXPECT_TRUE(half.send("POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"));
  EXPECT_TRUE(Served::comes([&] { return s.server().metrics().generated_tokens > 1500; }, 60));
  const auto begin = Clock::now();
  s.server().stop(milliseconds(0));
  EXPECT_LT(seconds_since(begin), 15);  // not the 30 s of a write
}

TEST(Ending, BeforeTheModelIsThere) {
  Served s;
  Raw half(s.server().port());
  EXPECT_TRUE(half.send("POST /v1/completions HTTP/1.1\r\n"));
  EXPECT_EQ(s.client().Get("/health")->status, 503);
  s.server().stop(milliseconds(10'000));
  EXPECT_EQ(half.read(), "");
}

}  // namespace
}  // namespace narrows::server
