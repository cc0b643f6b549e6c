// The end of the server: what is at work finishes or is told, what is new is refused, nothing is cut.
#include <atomic>
#include <future>

#include "server/front.h"
#include "server/served.h"
#include "server/socket_stream.h"

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

// docs/server_api.md: "Connections are closed when their last byte is written; clients that do not take their
// last bytes within 2 s are cut"
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
  EXPECT_TRUE(s.server().stop(milliseconds(10'000)));
  EXPECT_THAT(half.read(), HasSubstr("503 Service Unavailable"));
}

// docs/server_api.md: "requests that are not whole yet get 503 at once"
TEST(Ending, HalfARequestIsRefused) {
  Served s;
  s.load();
  Raw silent(s.server().port()), half(s.server().port()), body(s.server().port());
  const std::string request = post(kChat, chat_body());
  EXPECT_TRUE(half.send(request.substr(0, 20)));
  EXPECT_TRUE(body.send(request.substr(0, request.size() - 5)));
  InAnotherThread stream(s, chat_body(R"("stream":true,"max_tokens":8000)", "one"));
  ASSERT_TRUE(Served::comes([&] { return s.n_busy() == 1; }, 20));
  std::thread ender([&] { EXPECT_TRUE(s.server().stop(milliseconds(3000))); });
  for (const Raw* one : {&half, &body}) {
    const std::string reply = one->read();
    EXPECT_THAT(reply, HasSubstr("503 Service Unavailable"));
    EXPECT_THAT(reply, HasSubstr("unavailable_error"));
    EXPECT_THAT(reply, Not(HasSubstr("...")));
  }
  ender.join();
  EXPECT_EQ(silent.read(), "");
}

// Of any kind: here a handler that waits to be told.
// docs/server_api.md: "what cannot be interrupted (a text that is cut into tokens) is left behind"
TEST(Ending, IsNotKeptByWorkThatCannotBeInterrupted) {
  std::promise<void> go_on;
  const std::shared_future<void> told = go_on.get_future().share();
  std::atomic<int> n_at_work{0};
  Front::Hooks hooks;
  hooks.at_once = [](const RequestFrame&) { return false; };
  hooks.wants_body = [](const RequestFrame&) { return true; };
  hooks.refused = [](const Connection&, const RequestFrame&, const ApiError&) {};
  bool late = true;
  hooks.answer = [&](Connection& c) {
    ++n_at_work;
    told.wait();
    SocketStream stream(c.fd, "", milliseconds(1000), &c.has_writer);
    late = stream.write("HTTP/1.1 200 OK\r\n\r\n", 19) > 0;
    return false;
  };
  std::unique_ptr<Front> front = Front::start({}, std::move(hooks));
  ASSERT_NE(front, nullptr);
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  front->add(ends[0]);
  ASSERT_EQ(::send(ends[1], get("/x").data(), get("/x").size(), 0), static_cast<ssize_t>(get("/x").size()));
  ASSERT_TRUE(Served::comes([&] { return n_at_work == 1; }, 20));
  EXPECT_FALSE(front->end(milliseconds(100), Clock::now() + milliseconds(300)));
  char reply[4096] = {};
  EXPECT_GT(::recv(ends[1], reply, sizeof(reply) - 1, 0), 0);
  EXPECT_THAT(reply, HasSubstr("503 Service Unavailable"));
  EXPECT_EQ(::recv(ends[1], reply, sizeof(reply), 0), 0);
  go_on.set_value();
  front.reset();
  EXPECT_FALSE(late);  // who was told is told once
  ::close(ends[1]);
}

}  // namespace
}  // namespace narrows::server
