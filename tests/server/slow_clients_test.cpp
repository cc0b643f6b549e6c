// Clients that are silent, slow or many: what they cost others (nothing), and how long they are borne.
#include <algorithm>

#include "server/served.h"

namespace narrows::server {
namespace {

using std::chrono::milliseconds;

constexpr const char* kEndless = R"("stream":true,"max_tokens":8000)";

/// A stream that has begun.
Raw begun(const Served& s, int port, const std::string& content) {
  (void)s;
  Raw raw(port);
  EXPECT_TRUE(raw.send(post(kChat, chat_body(kEndless, content))));
  return raw;
}

// docs/server_api.md: "/health and /metrics are answered within 0.1 s, whatever else is going on"
// docs/server_api.md: "a client that is silent or slow takes no thread"
TEST(SlowClients, DoNotKeepOthersWaiting) {
  Served s;
  s.load();
  std::vector<Raw> slow;
  for (int i = 0; i < 120; ++i) {
    slow.emplace_back(s.server().port());
    const std::string request = post(kChat, chat_body());
    const size_t n = i % 3 == 0 ? 0 : i % 3 == 1 ? 30 : request.size() - 5;
    EXPECT_TRUE(slow.back().send(request.substr(0, n)));
  }
  const auto begin = Clock::now();
  EXPECT_EQ(s.client().Get("/health")->status, 200);
  EXPECT_EQ(s.client().Get("/metrics")->status, 200);
  EXPECT_EQ(s.client().Get("/slots")->status, 200);
  EXPECT_EQ(s.client().Post(kChat, chat_body(), kJson)->status, 200);
  EXPECT_LT(seconds_since(begin), 5);  // of 10 that a head may take, and 30 of a body
  const std::string request = post(kChat, chat_body());
  EXPECT_TRUE(slow[2].send(request.substr(request.size() - 5)));  // it was only slow
  EXPECT_THAT(slow[2].read("}\n"), HasSubstr("200 OK"));
}

// docs/server_api.md: "A head has 10 s from its first byte to its last, a body 30 s and 1 s more for each 100
// kB"
// docs/server_api.md: "the request did not come in time, or the answer was not read"
TEST(SlowClients, HaveATimeInAll) {
  HttpOptions http;
  http.head_timeout = milliseconds(400);
  http.io_timeout = milliseconds(400);
  Served s(http);
  s.load();
  const std::string request = post(kChat, chat_body());
  const size_t head = request.find("\r\n\r\n") + 4;
  for (const size_t n : {size_t{0}, size_t{1}, size_t{30}, head - 1, head, head + 1, request.size() - 1}) {
    Raw raw(s.server().port());
    EXPECT_TRUE(raw.send(request.substr(0, n)));
    const std::string reply = raw.read();
    EXPECT_EQ(reply.find("408 Request Timeout") != std::string::npos, n > 0) << n << reply;
    EXPECT_THAT(reply, Not(HasSubstr("..."))) << n;
  }
  // A byte now and then does not help.
  for (const size_t from : {size_t{0}, head}) {
    Raw raw(s.server().port());
    EXPECT_TRUE(raw.send(request.substr(0, from)));
    const auto begin = Clock::now();
    for (size_t i = from; i < request.size() && seconds_since(begin) < 10; ++i) {
      if (!raw.send(request.substr(i, 1))) break;
      if (const std::string reply = raw.read("}", 0.05); reply.size() > 10) {
        EXPECT_THAT(reply, HasSubstr("408"));
        break;
      }
    }
    EXPECT_LT(seconds_since(begin), 10);
  }
  EXPECT_THAT(s.log(), HasSubstr(R"("event":"refused")"));
}

// docs/server_api.md: "of more, the one that has waited longest is closed"
TEST(SlowClients, AreBoundedInNumber) {
  HttpOptions http;
  http.max_connections = 8;
  Served s(http);
  s.load();
  std::vector<Raw> silent;
  for (int i = 0; i < 40; ++i) silent.emplace_back(s.server().port());
  EXPECT_EQ(s.client().Get("/health")->status, 200);
  EXPECT_EQ(s.client().Post(kChat, chat_body(), kJson)->status, 200);
  EXPECT_EQ(silent[0].read(), "");  // closed by the server
  int n_open = 0;
  for (const Raw& raw : silent) n_open += raw.read("", 0.01) == "..." ? 1 : 0;
  EXPECT_LE(n_open, 8);
}

// docs/server_api.md: "All requests together hold four times --body-mb"; "beyond, the one that has been on
// its way longest gets 429."
TEST(SlowClients, BodiesTogetherAreBounded) {
  HttpOptions http;
  http.max_body_bytes = 1'000'000;
  Served s(http);
  s.load();
  std::vector<Raw> large;
  for (int i = 0; i < 6; ++i) {
    large.emplace_back(s.server().port());
    EXPECT_TRUE(large.back().send("POST " + std::string(kChat) +
                                  " HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" +
                                  std::string(900'000, ' ')));
    EXPECT_TRUE(Served::comes([&] { return s.client().Get("/health")->status == 200; }, 10));
  }
  EXPECT_THAT(large[0].read(), HasSubstr("429 Too Many Requests"));
  EXPECT_EQ(large[5].read("", 0.1), "...");  // the last one is still welcome
  EXPECT_EQ(s.client().Post(kChat, chat_body(), kJson)->status, 200);
}

// docs/server_api.md: 429, "--queue requests wait already"; "with Retry-After"
TEST(SlowClients, TheQueueIsAsLongAsItSays) {
  for (const auto& [n_slots, n_queue] : {std::pair{1, 0}, std::pair{2, 3}, std::pair{4, 64}}) {
    Served s({}, n_slots, n_queue);
    s.load();
    std::vector<Raw> streams;
    for (int i = 0; i < n_slots + n_queue; ++i)
      streams.push_back(begun(s, s.server().port(), "number " + std::to_string(i)));
    const auto taken = static_cast<uint64_t>(n_slots + n_queue);
    EXPECT_TRUE(Served::comes([&] { return s.server().metrics().requests == taken; }, 20));
    for (const char* stream : {"false", "true"}) {
      const auto r = s.client().Post(kChat, chat_body(std::string(R"("stream":)") + stream), kJson);
      EXPECT_EQ(r->status, 429);
      EXPECT_EQ(body_of(r)["error"]["type"], "rate_limit_error");
      EXPECT_EQ(r->get_header_value("Retry-After"), "1");
    }
    EXPECT_EQ(s.client().Get("/health")->status, 200);
    EXPECT_EQ(s.client().Get("/slots")->status, 200);
    EXPECT_EQ(s.server().metrics().refused, 2U);
    streams.clear();
    const auto again = [&] { return s.client().Post(kChat, chat_body(), kJson)->status == 200; };
    EXPECT_TRUE(Served::comes(again, 30));
  }
}

// The client knows that its answer is over: the queue knows too.
TEST(SlowClients, OneAfterTheOtherNeedsNoQueue) {
  Served s({}, 1, 0);
  s.load();
  auto c = s.client();
  for (int i = 0; i < 30; ++i) {
    EXPECT_EQ(c.Post(kChat, chat_body(), kJson)->status, 200) << i;
    EXPECT_EQ(body_of(c.Get("/slots"))[0]["state"], "idle") << i;
  }
}

// docs/server_api.md: "A client that does not take what is written to it within 30 s (1 s more for each 100
// kB) is cut"
TEST(SlowClients, WhoDoesNotReadIsCut) {
  HttpOptions http;
  http.io_timeout = milliseconds(500);
  Served s(http, 1);
  s.load();
  Raw deaf(s.server().port(), 4096);
  EXPECT_TRUE(
      deaf.send(post(kChat, chat_body(std::string(kEndless) + R"(,"logprobs":true,"top_logprobs":20)"))));
  EXPECT_TRUE(Served::comes([&] { return s.n_busy() == 1; }, 20));
  EXPECT_TRUE(Served::comes([&] { return s.n_busy() == 0; }, 60));
  EXPECT_GE(s.server().metrics().cancelled, 1U);
  EXPECT_LT(s.server().metrics().generated_tokens, 8000U);
}

TEST(Connections, KeepAlivePipelinesChunksAndExpectations) {
  Served s;
  s.load();
  Raw raw(s.server().port());
  EXPECT_TRUE(raw.send(get("/health") + get("/v1/models") + get("/health") + get("/slots")));
  const std::string four = raw.read("saving", 1);
  size_t n = 0;
  for (size_t at = four.find("200 OK"); at != std::string::npos; at = four.find("200 OK", at + 1)) ++n;
  EXPECT_EQ(n, 4U);
  EXPECT_LT(four.find("\"ok\""), four.find("\"list\""));  // in their order
  EXPECT_TRUE(raw.send("POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n{\"conten\r\n"));
  EXPECT_TRUE(raw.send("8\r\nt\":\"he\"}\r\n0\r\n\r\n"));
  EXPECT_THAT(raw.read("}\n"), HasSubstr("257"));
  const std::string with = post("/tokenize", R"({"content":"he"})", "Expect: 100-continue\r\n");
  EXPECT_TRUE(raw.send(with.substr(0, with.size() - 16)));
  EXPECT_EQ(raw.read("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  EXPECT_TRUE(raw.send(with.substr(with.size() - 16)));
  const std::string reply = raw.read("}\n");
  EXPECT_THAT(reply, HasSubstr("257"));
  EXPECT_THAT(reply, Not(HasSubstr("100 Continue")));
  EXPECT_TRUE(raw.send("GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"));
  EXPECT_THAT(raw.read(), HasSubstr("Connection: close"));
}

// Their bodies are not waited for.
// docs/server_api.md: "A key or page that is refused is refused before its body is read."
TEST(Connections, WhoMayNotInIsToldAtOnce) {
  HttpOptions http;
  http.api_keys = {"key"};
  Served s(http);
  s.load();
  const auto head = [](const std::string& more) {
    return "POST " + std::string(kChat) + " HTTP/1.1\r\nHost: localhost\r\n" + more +
           "Content-Length: 1000\r\n\r\n";
  };
  Raw raw(s.server().port());
  EXPECT_TRUE(raw.send(head("")));
  EXPECT_THAT(raw.read(), HasSubstr("401 Unauthorized"));
  Raw page(s.server().port());
  EXPECT_TRUE(page.send(head("Authorization: Bearer key\r\nOrigin: http://evil.example\r\n")));
  EXPECT_THAT(page.read(), HasSubstr("403 Forbidden"));
  Raw good(s.server().port());
  EXPECT_TRUE(good.send(head("Authorization: Bearer key\r\n")));
  EXPECT_EQ(good.read("", 0.2), "...");
}

}  // namespace
}  // namespace narrows::server
