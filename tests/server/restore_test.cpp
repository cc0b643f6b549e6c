// Sessions from files count as memory like any other cache.
#include <algorithm>

#include "kv/kv_cache.h"
#include "server/served.h"

namespace narrows::server {
namespace {

/// Bytes of all caches.
int64_t cached_bytes(const Served& s) {
  const auto r = s.client().Get("/metrics");
  const std::string name = "narrows_cache_bytes ";
  return std::stoll(r->body.substr(r->body.find("\n" + name) + 1 + name.size()));
}

class Restoring : public ::testing::Test {
 protected:
  void SetUp() override {
    http_.session_dir = dir_.path("").substr(0, dir_.path("").size() - 1);
    Served s(http_, 1);
    s.load();
    auto c = s.client();
    for (const auto& [name, n] : {std::pair{"small", 50}, std::pair{"large", 6000}}) {
      EXPECT_EQ(c.Post(kChat, chat_body("", std::string(static_cast<size_t>(n), 'q')), kJson)->status, 200);
      const std::string body = std::string(R"({"filename":")") + name + "\"}";
      EXPECT_EQ(c.Post("/slots/0?action=save", body, kJson)->status, 200);
      EXPECT_EQ(c.Post("/slots/0?action=restore", body, kJson)->status,
                200);  // smaller: without rebuilt keys
      (name == std::string("small") ? small_ : large_) = body_of(c.Get("/slots"))[0]["cache_bytes"];
    }
    EXPECT_LT(4 * small_, large_);
  }
  static httplib::Result restore(const Served& s, int slot, const std::string& name) {
    return s.client().Post("/slots/" + std::to_string(slot) + "?action=restore",
                           R"({"filename":")" + name + "\"}", kJson);
  }

  narrows::testing::TempDir dir_;
  HttpOptions http_;
  int64_t small_ = 0, large_ = 0;
};

// docs/server_api.md: "or the session to be restored, is larger than what --cache-mb leaves; with both
// figures"
TEST_F(Restoring, WhatDoesNotFitIsRefusedWithBothFigures) {
  const int64_t limit = large_ / 2;
  Served s(http_, 2, 64, limit);
  s.load();
  ASSERT_EQ(restore(s, 1, "small")->status, 200);
  const auto refused = restore(s, 1, "large");
  EXPECT_EQ(refused->status, 503);
  const json error = body_of(refused)["error"];
  EXPECT_EQ(error["type"], "out_of_memory_error");
  EXPECT_THAT(error["message"],
              ::testing::ContainsRegex("takes [0-9.]+ MB and the server may use [0-9.]+ MB"));
  EXPECT_LE(cached_bytes(s), limit);
  EXPECT_EQ(body_of(s.client().Get("/slots"))[1]["cache_bytes"], small_);  // what was there still is
}

// docs/server_api.md: "kept prefixes and idle slots are let go for it"; "the earlier one goes first"
TEST_F(Restoring, RoomIsMade) {
  const int64_t limit = large_ + large_ / 2;
  Served s(http_, 2, 64, limit);
  s.load();
  ASSERT_EQ(restore(s, 0, "large")->status, 200);
  ASSERT_EQ(restore(s, 1, "large")->status, 200);
  EXPECT_LE(cached_bytes(s), limit);
  const json slots = body_of(s.client().Get("/slots"));
  EXPECT_EQ(slots[0]["cache_tokens"], 0);
  EXPECT_GT(slots[1]["cache_tokens"], 6000);
  ASSERT_EQ(restore(s, 1, "large")->status, 200);  // not both at a time
  EXPECT_LE(cached_bytes(s), limit);
}

// docs/server_api.md: "what requests at work may come to is not"
TEST_F(Restoring, NotWhatIsAtWork) {
  const int64_t at_work = cache_bytes_estimate(*tiny().model, narrows::testing::kv("klt"), 3200, true);
  const int64_t limit = std::max(large_, at_work) + 2 * small_;
  Served s(http_, 2, 64, limit);
  s.load();
  Raw stream(s.server().port());
  EXPECT_TRUE(stream.send(post(kChat, chat_body(R"("stream":true,"max_tokens":3000)"))));
  EXPECT_TRUE(Served::comes([&] { return s.n_busy() == 1; }, 20));
  const int busy = body_of(s.client().Get("/slots"))[0]["state"] == "idle" ? 1 : 0;
  EXPECT_EQ(restore(s, 1 - busy, "large")->status, 503);
  EXPECT_EQ(restore(s, 1 - busy, "small")->status, 200);
  stream.close();
  EXPECT_TRUE(Served::comes([&] { return s.n_busy() == 0; }, 20));
  EXPECT_EQ(restore(s, 1 - busy, "large")->status, 200);
}

/// No limit once it goes.
struct Limit {
  explicit Limit(int64_t bytes) { set_memory_limit(bytes); }
  Limit(const Limit&) = delete;
  Limit& operator=(const Limit&) = delete;
  ~Limit() { set_memory_limit(0); }
};

// docs/server_api.md: "Or the process's memory (--memory-mb, else what the system has) is promised already"
TEST(Ledger, WhatIsPromisedAlreadyIsNotPromisedAgain) {
  Served s({}, 1);
  s.load();
  auto c = s.client();
  const std::string question = chat_body("", std::string(3000, 'q'));
  {
    const MemoryStats m = memory_stats();
    const Limit limit(m.weights + m.caches + m.scratch + m.prompts + m.files + 10'000);
    const auto refused = c.Post(kChat, question, kJson);
    EXPECT_EQ(refused->status, 503) << refused->body;
    EXPECT_EQ(body_of(refused)["error"]["type"], "out_of_memory_error");
  }
  EXPECT_EQ(c.Post(kChat, question, kJson)->status, 200);
}

}  // namespace
}  // namespace narrows::server
