// The server over real sockets, on a tiny model: what clients get, and what bad ones cannot do.
#include <zlib.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "server/served.h"

namespace narrows::server {
namespace {

// docs/server_api.md: "503 while the model is loaded"; "the model is being loaded, or the server is ending"
TEST(Http, IsThereBeforeTheModel) {
  Served s;
  auto c = s.client();
  EXPECT_EQ(c.Get("/health")->status, 503);
  EXPECT_EQ(c.Post("/v1/chat/completions", chat_body(), kJson)->status, 503);
  EXPECT_EQ(c.Get("/")->status, 200);
  s.load();
  EXPECT_EQ(c.Get("/health")->status, 200);
  EXPECT_EQ(c.Post("/v1/chat/completions", chat_body(), kJson)->status, 200);
}

TEST(Http, ChatWholeAndStreamed) {
  Served s;
  s.load();
  auto c = s.client();
  const json whole =
      body_of(c.Post("/v1/chat/completions", chat_body(R"("logprobs":true,"top_logprobs":2)"), kJson));
  EXPECT_EQ(whole["object"], "chat.completion");
  EXPECT_EQ(whole["model"], "tiny");
  EXPECT_EQ(whole["choices"][0]["message"]["role"], "assistant");
  EXPECT_EQ(whole["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(whole["choices"][0]["logprobs"]["content"].size(), 8U);
  EXPECT_EQ(whole["usage"]["completion_tokens"], 8);
  EXPECT_EQ(whole["usage"]["total_tokens"], 8 + whole["usage"]["prompt_tokens"].get<int>());
  EXPECT_EQ(whole["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  EXPECT_EQ(whole["narrows"]["kv"], "klt");
  EXPECT_GT(whole["narrows"]["cache_bytes"], 0);

  const auto r = c.Post(
      "/v1/chat/completions",
      chat_body(R"("stream":true,"stream_options":{"include_usage":true},"return_progress":true)"), kJson);
  EXPECT_THAT(r->get_header_value("Content-Type"), HasSubstr("text/event-stream"));
  const auto events = events_of(r->body);
  ASSERT_GE(events.size(), 4U);
  EXPECT_EQ(events.back(), "[DONE]");
  EXPECT_EQ(events[events.size() - 2]["usage"]["completion_tokens"], 8);
  std::string text, role;
  bool progress = false;
  for (size_t i = 0; i + 2 < events.size(); ++i) {
    EXPECT_EQ(events[i]["object"], "chat.completion.chunk");
    EXPECT_EQ(events[i]["id"], events[0]["id"]);
    progress = progress || (events[i].contains("narrows") && events[i]["narrows"].contains("progress"));
    if (events[i]["choices"].empty()) continue;
    const json& delta = events[i]["choices"][0]["delta"];
    text += delta.value("content", "");
    role += delta.value("role", "");
  }
  EXPECT_EQ(text, whole["choices"][0]["message"]["content"]);
  EXPECT_EQ(role, "assistant");
  EXPECT_TRUE(progress);
}

TEST(Http, CompletionsOfSeveralPrompts) {
  Served s;
  s.load();
  auto c = s.client();
  const json r = body_of(c.Post(
      "/v1/completions",
      R"({"prompt":["abc",[65,66]],"max_tokens":4,"temperature":0,"n":2,"echo":true,"ignore_eos":true})",
      kJson));
  ASSERT_EQ(r["choices"].size(), 4U);
  EXPECT_EQ(r["object"], "text_completion");
  EXPECT_EQ(r["choices"][0]["text"].get<std::string>().substr(0, 3), "abc");
  EXPECT_EQ(r["choices"][0]["text"], r["choices"][1]["text"]);  // greedy
  EXPECT_EQ(r["usage"]["completion_tokens"], 16);
  EXPECT_EQ(r["usage"]["prompt_tokens"], 5);
  EXPECT_EQ(r["narrows"]["choices"].size(), 4U);
}

TEST(Http, SmallEndpoints) {
  Served s;
  s.load();
  auto c = s.client();
  EXPECT_EQ(body_of(c.Get("/v1/models"))["data"][0]["id"], "tiny");
  EXPECT_EQ(body_of(c.Get("/props"))["total_slots"], 2);
  EXPECT_EQ(body_of(c.Post("/tokenize", R"({"content":"hehx"})", kJson))["tokens"], json({257, 'h', 'x'}));
  EXPECT_EQ(
      body_of(c.Post("/tokenize", R"({"content":"he","with_pieces":true})", kJson))["tokens"][0]["piece"],
      "he");
  EXPECT_EQ(body_of(c.Post("/detokenize", R"({"tokens":[257,120,255]})", kJson))["content"],
            "hex\xEF\xBF\xBD");
  EXPECT_EQ(
      body_of(c.Post("/apply-template", R"({"messages":[{"role":"user","content":"hi"}]})", kJson))["prompt"],
      "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(body_of(c.Get("/slots")).size(), 2U);
  (void)c.Post("/v1/chat/completions", chat_body(), kJson);
  const auto metrics = c.Get("/metrics");
  EXPECT_THAT(metrics->body, HasSubstr("narrows_generated_tokens_total 8\n"));
  EXPECT_THAT(metrics->body, HasSubstr("# TYPE narrows_slots gauge"));
  for (const char* path : {"/", "/chat.js", "/chat.css"}) {
    const auto page = c.Get(path);
    EXPECT_EQ(page->status, 200);
    EXPECT_THAT(page->get_header_value("Content-Security-Policy"), HasSubstr("default-src 'none'"));
    EXPECT_THAT(page->body, Not(HasSubstr("http")));  // nothing from elsewhere
  }
}

// docs/server_api.md: "or is not application/json"; "Everything that can be known before the first token is
// refused before a stream begins"
TEST(Http, ErrorsAreJson) {
  HttpOptions http;
  http.max_body_bytes = 100'000;
  Served s(http);
  s.load();
  auto c = s.client();
  const auto expect_error = [&](const httplib::Result& r, int code, const std::string& word) {
    const json e = body_of(r)["error"];
    EXPECT_EQ(r->status, code) << r->body;
    EXPECT_EQ(e["code"], code);
    EXPECT_THAT(e["message"].get<std::string>(), HasSubstr(word));
    EXPECT_TRUE(e["type"].is_string());
  };
  const char* chat = "/v1/chat/completions";
  expect_error(c.Get("/nowhere"), 404, "no such path");
  expect_error(c.Post(chat, "{", kJson), 400, "JSON");
  expect_error(c.Post(chat, "", kJson), 400, "JSON");
  expect_error(c.Post(chat, chat_body(), "text/plain"), 415, "application/json");
  expect_error(c.Post(chat, "a=b", "application/x-www-form-urlencoded"), 415, "application/json");
  expect_error(c.Post(chat, chat_body(R"("temperature":-1)"), kJson), 400, "temperature");
  expect_error(c.Post(chat, chat_body(R"("narrows":{"kv":"nonsense"})"), kJson), 400, "nonsense");
  expect_error(c.Post(chat, chat_body(R"("stream":true,"grammar":"root ::= other")"), kJson), 400, "other");
  expect_error(c.Post(chat, chat_body("", std::string(150'000, 'a')), kJson), 413, "larger");
  for (const char* stream : {"false", "true"}) {
    const auto r =
        c.Post(chat, chat_body(std::string(R"("stream":)") + stream, std::string(9000, 'a')), kJson);
    expect_error(r, 400, "This model's maximum context length is 8192 tokens");
    const json e = body_of(r)["error"];
    EXPECT_EQ(e["type"], "exceed_context_size_error");
    EXPECT_EQ(e["n_ctx"], 8192);
    EXPECT_GT(e["n_prompt_tokens"], 9000);
  }
  EXPECT_EQ(c.Post(chat, chat_body(), kJson)->status, 200);
}

// docs/server_api.md: "on all paths but /health and the page"; "--cors-origin ORIGIN lets one in."
TEST(Http, KeysAndOrigins) {
  HttpOptions http;
  http.api_keys = {"first", "second"};
  Served s(http);
  s.load();
  auto c = s.client();
  for (const char* path : {"/v1/models", "/slots", "/metrics", "/props"})
    EXPECT_EQ(c.Get(path)->status, 401) << path;
  for (const char* path : {"/health", "/", "/chat.js"}) EXPECT_EQ(c.Get(path)->status, 200) << path;
  for (const char* key : {"f", "firs", "first2", "Second"})
    EXPECT_EQ(c.Get("/v1/models", httplib::Headers{{"Authorization", std::string("Bearer ") + key}})->status,
              401)
        << key;
  EXPECT_EQ(c.Get("/v1/models", httplib::Headers{{"Authorization", "Basic first"}})->status, 401);
  EXPECT_EQ(c.Get("/v1/models", httplib::Headers{{"Authorization", "Bearer second"}})->status, 200);
  EXPECT_EQ(c.Get("/v1/models", httplib::Headers{{"X-Api-Key", "first"}})->status, 200);
  EXPECT_FALSE(c.Get("/health", httplib::Headers{{"Origin", "http://evil"}})
                   ->has_header("Access-Control-Allow-Origin"));
  EXPECT_THAT(s.log(), Not(HasSubstr("second")));

  HttpOptions open;
  open.cors_origin = "http://friend";
  Served with(open);
  with.load();
  auto d = with.client();
  EXPECT_EQ(d.Get("/health", httplib::Headers{{"Origin", "http://friend"}})
                ->get_header_value("Access-Control-Allow-Origin"),
            "http://friend");
  const auto preflight = d.Options("/v1/chat/completions");
  EXPECT_EQ(preflight->status, 204);
  EXPECT_THAT(preflight->get_header_value("Access-Control-Allow-Headers"), HasSubstr("Authorization"));
}

// docs/server_api.md: "with the headers that its preflight asks for"
TEST(Http, APreflightGetsWhatItAsksFor) {
  HttpOptions open;
  open.cors_origin = "http://friend";
  Served s(open);
  s.load();
  auto c = s.client();
  const auto allowed = [&](const std::string& asked) {
    return c.Options("/v1/messages", httplib::Headers{{"Access-Control-Request-Headers", asked}})
        ->get_header_value("Access-Control-Allow-Headers");
  };
  EXPECT_EQ(allowed("x-api-key, anthropic-version,x-stainless-os"),
            "x-api-key, anthropic-version,x-stainless-os");
  EXPECT_EQ(allowed("a: b; c"), "Authorization, Content-Type");
  EXPECT_EQ(allowed(std::string(3000, 'a')), "Authorization, Content-Type");
}

// docs/server_api.md: "a path that takes other methods; Allow names them"
TEST(Http, KnownPathsTellTheirMethods) {
  Served s;
  s.load();
  auto c = s.client();
  for (const auto& [path, allow] : {std::pair("/v1/chat/completions", "POST"), {"/slots/0", "POST"}}) {
    const auto r = c.Get(path);
    EXPECT_EQ(r->status, 405) << path;
    EXPECT_EQ(r->get_header_value("Allow"), allow);
    EXPECT_THAT(body_of(r)["error"]["message"].get<std::string>(), HasSubstr("method"));
  }
  const auto r = c.Post("/v1/models", "{}", kJson);
  EXPECT_EQ(r->status, 405);
  EXPECT_EQ(r->get_header_value("Allow"), "GET, HEAD");
  EXPECT_EQ(c.Get("/v1/nowhere")->status, 404);
  EXPECT_EQ(c.Delete("/health")->status, 405);
}

std::string compressed(const std::string& text, int window) {
  z_stream z = {};
  EXPECT_EQ(deflateInit2(&z, 9, Z_DEFLATED, window, 9, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(text.size() / 2 + 1000, '\0');
  z.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  z.avail_in = static_cast<uInt>(text.size());
  z.next_out = reinterpret_cast<Bytef*>(out.data());
  z.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&z, Z_FINISH), Z_STREAM_END);
  out.resize(z.total_out);
  deflateEnd(&z);
  return out;
}

// docs/server_api.md: "A body may come with Content-Encoding: gzip or deflate"; "its bound is that of what it
// unpacks to"
TEST(Http, CompressedBodies) {
  HttpOptions http;
  http.max_body_bytes = 100'000;
  Served s(http);
  s.load();
  auto c = s.client();
  const auto post = [&](const std::string& body, const char* encoding) {
    return c.Post("/v1/chat/completions", httplib::Headers{{"Content-Encoding", encoding}}, body, kJson);
  };
  const std::string body = chat_body("", "a question");
  const std::string gzip = compressed(body, 31), zlib = compressed(body, 15);
  const auto plain = c.Post("/v1/chat/completions", body, kJson);
  ASSERT_EQ(plain->status, 200);
  for (const auto& r :
       {post(gzip, "gzip"), post(gzip, "GZIP"), post(zlib, "deflate"), post(body, "identity")}) {
    EXPECT_EQ(r->status, 200) << r->body;
    EXPECT_EQ(body_of(r)["choices"], body_of(plain)["choices"]);
  }
  EXPECT_EQ(post(gzip, "br")->status, 415);
  EXPECT_EQ(post(gzip.substr(0, gzip.size() / 2), "gzip")->status, 400);
  EXPECT_EQ(post(gzip + "x", "gzip")->status, 400);
  EXPECT_EQ(post(body, "gzip")->status, 400);
  EXPECT_EQ(post("", "gzip")->status, 400);
  std::string damaged = gzip;
  damaged[gzip.size() - 6] ^= 1;
  EXPECT_EQ(post(damaged, "gzip")->status, 400);
  // 50 MB of one letter are 50 kB.
  const auto bomb = post(compressed(std::string(50'000'000, ' '), 31), "gzip");
  EXPECT_EQ(bomb->status, 413) << bomb->body;
}

// docs/server_api.md: "longer than --timeout"; "what fails later is an event data"
TEST(Http, ARequestHasItsTime) {
  HttpOptions http;
  http.request_timeout = std::chrono::seconds(1);
  Served s(http);
  s.load();
  auto c = s.client();
  const std::string endless = R"("max_tokens":8000)";  // the later field counts
  EXPECT_EQ(c.Post("/v1/chat/completions", chat_body(endless), kJson)->status, 504);
  const auto events =
      events_of(c.Post("/v1/chat/completions", chat_body(endless + R"(,"stream":true)"), kJson)->body);
  ASSERT_GE(events.size(), 2U);
  EXPECT_EQ(events.back()["error"]["code"], 504);
}

// A page of another site, and a name of another site that was pointed at this machine.
// docs/server_api.md: "Without keys a server on this machine's own address answers to this machine's names
// alone"
// docs/server_api.md: "a proxy has to send Host: localhost or a key"
TEST(Http, ForeignPages) {
  Served s;
  s.load();
  auto c = s.client();
  const std::string own = "127.0.0.1:" + std::to_string(c.port());
  const auto status = [&](const httplib::Headers& headers) { return c.Get("/v1/models", headers)->status; };
  EXPECT_EQ(status({}), 200);
  EXPECT_EQ(status({{"Origin", "http://" + own}}), 200);
  for (const char* origin : {"http://evil.example", "null", "http://127.0.0.1:1"})
    EXPECT_EQ(status({{"Origin", origin}}), 403) << origin;
  for (const char* host : {"localhost", "localhost:80", "[::1]:80", "127.0.0.1"})
    EXPECT_EQ(status({{"Host", host}}), 200) << host;
  for (const char* host : {"evil.example", "127.evil.example:80", "localhost.evil.example"})
    EXPECT_EQ(status({{"Host", host}}), 403) << host;
  EXPECT_EQ(c.Post("/slots/0?action=erase", {{"Origin", "http://evil.example"}}, "", "")->status, 403);

  HttpOptions keys;
  keys.api_keys = {"key"};  // a foreign name knows none
  Served with(keys);
  with.load();
  EXPECT_EQ(
      with.client().Get("/v1/models", httplib::Headers{{"Host", "proxied"}, {"X-Api-Key", "key"}})->status,
      200);
}

// docs/server_api.md: "sessions without --session-dir"
TEST(Http, SlotsSaveRestoreErase) {
  const narrows::testing::TempDir dir;
  HttpOptions http;
  http.session_dir = dir.path("").substr(0, dir.path("").size() - 1);
  Served s(http, 2);
  s.load();
  auto c = s.client();
  const std::string text(2600, 'q');
  const json first = body_of(c.Post("/v1/chat/completions", chat_body("", text), kJson));
  const int slot = first["narrows"]["slot"];
  const std::string base = "/slots/" + std::to_string(slot);
  const json saved = body_of(c.Post(base + "?action=save", R"({"filename":"talk"})", kJson));
  EXPECT_EQ(saved["n_saved"], first["narrows"]["cache_tokens"]);
  EXPECT_GT(saved["n_written"], 1000);
  EXPECT_EQ(body_of(c.Get("/sessions"))["data"][0]["filename"], "talk");
  EXPECT_EQ(body_of(c.Post(base + "?action=erase", "{}", kJson))["n_erased"], saved["n_saved"]);

  // Another server, as after a restart.
  Served again(http, 2);
  again.load();
  auto d = again.client();
  const json restored = body_of(d.Post("/slots/1?action=restore", R"({"filename":"talk"})", kJson));
  EXPECT_EQ(restored["n_restored"], saved["n_saved"]);
  const json second = body_of(d.Post("/v1/chat/completions", chat_body("", text), kJson));
  EXPECT_GT(second["usage"]["prompt_tokens_details"]["cached_tokens"], 2000);
  EXPECT_EQ(second["choices"][0]["message"]["content"], first["choices"][0]["message"]["content"]);

  // What must not work.
  const auto status = [&](const std::string& path, const std::string& body) {
    return d.Post(path, body, kJson)->status;
  };
  for (const char* name : {"../x", "/etc/passwd", "..", "a/b", ".x", "", "a\\u0000b"}) {
    const std::string body = std::string(R"({"filename":")") + name + "\"}";
    EXPECT_EQ(status("/slots/0?action=save", body), 400) << name;
    EXPECT_EQ(status("/slots/0?action=restore", body), 400) << name;
  }
  EXPECT_EQ(status("/slots/0?action=restore", R"({"filename":"none"})"), 400);
  EXPECT_EQ(status("/slots/0?action=dance", R"({"filename":"x"})"), 400);
  EXPECT_EQ(status("/slots/7?action=erase", "{}"), 404);
  EXPECT_EQ(status("/slots/x?action=erase", "{}"), 404);
  {
    std::ofstream damage(dir.path("talk"), std::ios::binary | std::ios::in | std::ios::out);
    damage.seekp(5000);
    damage << "damage";
  }
  const auto r = d.Post("/slots/0?action=restore", R"({"filename":"talk"})", kJson);
  EXPECT_EQ(r->status, 400);
  EXPECT_THAT(r->body, HasSubstr("checksum"));
  EXPECT_EQ(d.Post("/v1/chat/completions", chat_body(), kJson)->status, 200);

  Served without;
  without.load();
  EXPECT_EQ(without.client().Post("/slots/0?action=save", R"({"filename":"x"})", kJson)->status, 501);
}

// While the answer is streamed, while it is waited for, while the prompt is read.
TEST(Http, AClientThatLeavesFreesItsSlot) {
  Served s({}, 1);
  s.load();
  const auto busy = [&] {
    for (const SlotInfo& slot : s.scheduler().slots()) {
      if (slot.state != SlotState::idle) return true;
    }
    return false;
  };
  for (const bool streams : {true, false}) {
    for (const size_t n_prompt : {10, 7000}) {
      auto c = s.client();
      std::thread leaver([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        c.stop();
      });
      const std::string fields = streams ? R"("stream":true,"max_tokens":8000)" : R"("max_tokens":8000)";
      (void)c.Post("/v1/chat/completions", chat_body(fields, std::string(n_prompt, 'z')), kJson);
      leaver.join();
      const auto begin = Clock::now();
      while (busy() && seconds_since(begin) < 10) std::this_thread::sleep_for(std::chrono::milliseconds(10));
      EXPECT_LT(seconds_since(begin), 2) << streams << " " << n_prompt;
    }
  }
}

// docs/server_api.md: "prompts and answers are in them only with --log-prompts"
TEST(Http, LogsNoPromptsUnlessAsked) {
  for (const bool asked : {false, true}) {
    HttpOptions http;
    http.log_prompts = asked;
    Served s(http);
    s.load();
    (void)s.client().Post("/v1/chat/completions", chat_body("", "my secret question"), kJson);
    const auto begin = Clock::now();
    while (s.log().find("\"request\"") == std::string::npos && seconds_since(begin) < 5)
      std::this_thread::yield();
    EXPECT_THAT(s.log(), HasSubstr("\"generation\""));
    EXPECT_EQ(s.log().find("secret question") != std::string::npos, asked);
    std::istringstream lines(s.log());
    for (std::string line; std::getline(lines, line);)
      EXPECT_TRUE(json::parse(line, nullptr, false).is_object()) << line;
  }
}

TEST(Http, EndsWhileStreaming) {
  Served s({}, 2);
  s.load();
  std::thread ender([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    s.server().stop(std::chrono::milliseconds(0));
  });
  auto c = s.client();
  const auto r = c.Post("/v1/chat/completions", chat_body(R"("stream":true,"max_tokens":8000)"), kJson);
  ender.join();
  if (r) {
    EXPECT_THAT(r->body, HasSubstr("shutting down"));
  }
  EXPECT_FALSE(s.client().Get("/health"));
}

TEST(Http, AnAddressInUseIsASentence) {
  Served s;
  HttpOptions http;
  http.port = s.server().port();
  const auto second = HttpServer::start(http, {});
  EXPECT_EQ(second.status().code(), StatusCode::invalid_argument);
  EXPECT_THAT(second.status().message(), HasSubstr(std::to_string(http.port)));
}

}  // namespace
}  // namespace narrows::server
