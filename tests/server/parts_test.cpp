// Stop strings, errors, keys, names of sessions: the parts without a model.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "server/api_error.h"
#include "server/http_server.h"
#include "server/stop_strings.h"

namespace narrows::server {
namespace {

/// Text shown when it comes in pieces of n bytes.
std::string shown(const std::vector<std::string>& stops, const std::string& text, size_t n,
                  std::string* found = nullptr) {
  StopStrings s(stops);
  std::string out;
  for (size_t at = 0; at < text.size(); at += n) out += s.push(text.substr(at, n));
  if (found != nullptr) *found = s.found();
  if (!s.stopped()) out += s.flush();
  return out;
}

TEST(StopStrings, AreFoundAcrossPieces) {
  for (size_t n = 1; n <= 12; ++n) {
    std::string found;
    EXPECT_EQ(shown({"STOP"}, "one STOP two", n, &found), "one ") << n;
    EXPECT_EQ(found, "STOP");
    EXPECT_EQ(shown({"STOP"}, "STSTOPx", n), "ST") << n;
    EXPECT_EQ(shown({"aab"}, "aaaab", n), "aa") << n;
    EXPECT_EQ(shown({"STOP"}, "no STO", n, &found), "no STO") << n;
    EXPECT_EQ(found, "");
    EXPECT_EQ(shown({"xyz", "b"}, "abc xyz", n, &found), "a") << n;
    EXPECT_EQ(found, "b");
    EXPECT_EQ(shown({"\n\n", "\n"}, "a\n\nb", n), "a") << n;
    EXPECT_EQ(shown({""}, "text", n), "text") << n;
    EXPECT_EQ(shown({}, "text", n), "text") << n;
    EXPECT_EQ(shown({"\xC3\xA9"}, "caf\xC3\xA9!", n), "caf") << n;  // cut inside a character
  }
}

TEST(StopStrings, ShowWhatCannotBecomeOne) {
  StopStrings s({"STOP"});
  EXPECT_EQ(s.push("abcS"), "abc");
  EXPECT_EQ(s.push("T"), "");
  EXPECT_EQ(s.push("x"), "STx");
  EXPECT_EQ(s.push("STOP and more"), "");
  EXPECT_TRUE(s.stopped());
  EXPECT_EQ(s.push("even more"), "");
}

TEST(ApiErrors, OneTableOfCodes) {
  const std::pair<StatusCode, int> table[] = {
      {StatusCode::invalid_argument, 400}, {StatusCode::invalid_file, 400}, {StatusCode::context_full, 400},
      {StatusCode::cancelled, 499},        {StatusCode::unsupported, 501},  {StatusCode::out_of_memory, 503},
      {StatusCode::disk_full, 507},        {StatusCode::io_error, 500},     {StatusCode::non_finite, 500},
      {StatusCode::internal, 500}};
  for (const auto& [code, http] : table) {
    const ApiError e = to_api_error({code, "why"});
    EXPECT_EQ(e.http_code, http);
    EXPECT_EQ(e.message, "why");
    EXPECT_FALSE(e.type.empty());
  }
  const auto json = nlohmann::json::parse(to_json(context_exceeded(9000, 8192)))["error"];
  EXPECT_EQ(json["type"], "exceed_context_size_error");
  EXPECT_EQ(json["code"], 400);
  EXPECT_EQ(json["n_prompt_tokens"], 9000);
  EXPECT_EQ(json["n_ctx"], 8192);
  EXPECT_EQ(nlohmann::json::parse(to_json(bad_request("\xFF", "p")))["error"]["param"], "p");
}

// docs/server_api.md: "compared in constant time"
TEST(Keys, AreComparedWhole) {
  EXPECT_TRUE(equal_in_constant_time("", ""));
  EXPECT_TRUE(equal_in_constant_time("secret", "secret"));
  for (const char* other : {"", "s", "secre", "secret1", "Secret", "secrez"}) {
    EXPECT_FALSE(equal_in_constant_time(other, "secret")) << other;
    EXPECT_FALSE(equal_in_constant_time("secret", other)) << other;
  }
}

TEST(SessionNames, StayInTheirFolder) {
  for (const char* good : {"a", "chat-1.session", "A_b.C", "7"})
    EXPECT_TRUE(check_session_name(good).ok()) << good;
  const std::string zero("a\0b", 3), newline = "a\nb";
  for (const std::string& bad :
       {std::string(), std::string("."), std::string(".."), std::string("../x"), std::string("a/b"),
        std::string("/etc/passwd"), std::string(".hidden"), std::string("a\\b"), zero, newline,
        std::string("a b"), std::string("%2e%2e"), std::string("\xC3\xA9"), std::string(201, 'a')})
    EXPECT_EQ(check_session_name(bad).code(), StatusCode::invalid_argument) << bad;
}

}  // namespace
}  // namespace narrows::server
