// Answers taken apart as they come: nothing is lost, nothing is given twice.
#include "server/answer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "temp_dir.h"
#include "text/chat_request.h"
#include "text/tool_template.h"

namespace narrows::server {
namespace {

/// Of a tool `get_weather` in the test template's words, or of thinking.
std::shared_ptr<const AnswerFormat> format_of(const char* chat_template, bool tools) {
  const narrows::testing::TempDir dir;
  EXPECT_TRUE(narrows::testing::tool_vocabulary(chat_template).write(dir.path("v.gguf")));
  const auto tokenizer = Tokenizer::load(dir.path("v.gguf"));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  ChatRequest request;
  request.messages = {{"user", "hi"}};
  if (tools) {
    const std::string schema =
        R"({"type":"object","properties":{"city":{"type":"string"}},"required":["city"]})";
    request.tools = {{"get_weather", "d", schema, schema}};
  }
  auto chat = prepare_chat(**tokenizer, request);
  EXPECT_TRUE(chat.ok()) << chat.status().message();
  return chat.ok() ? chat->format : nullptr;
}

/// All deltas of a text that comes in pieces of n bytes, put together.
ChatMessage pieced(const std::shared_ptr<const AnswerFormat>& format, const std::string& text, size_t n) {
  Answer answer(format, "7");
  ChatMessage all{"assistant", ""};
  const auto take = [&](const AnswerDelta& delta) {
    all.content += delta.content;
    all.reasoning += delta.reasoning;
    for (const AnswerDelta::Call& call : delta.calls) {
      EXPECT_EQ(call.begins, call.index == all.tool_calls.size());
      if (call.begins) all.tool_calls.push_back({call.id, call.name, ""});
      all.tool_calls[call.index].arguments += call.arguments;
    }
  };
  for (size_t at = 0; at < text.size(); at += n) take(answer.add(text.substr(at, n)));
  take(answer.finish());
  EXPECT_EQ(answer.message().content, all.content);
  EXPECT_EQ(answer.message().reasoning, all.reasoning);
  EXPECT_EQ(answer.message().tool_calls.size(), all.tool_calls.size());
  return all;
}

constexpr const char* kCall =
    "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";

TEST(Answer, WithoutAFormatAllIsContent) {
  EXPECT_EQ(pieced(nullptr, "<tool_call>x", 2).content, "<tool_call>x");
}

TEST(Answer, CallsComeInPieces) {
  const auto format = format_of(narrows::testing::kToolTemplate, true);
  for (const size_t n : {size_t{1}, size_t{3}, size_t{1000}}) {
    const ChatMessage said = pieced(format, std::string("Ok. ") + kCall, n);
    ASSERT_EQ(said.tool_calls.size(), 1U) << n;
    EXPECT_EQ(said.tool_calls[0].name, "get_weather");
    EXPECT_EQ(said.tool_calls[0].arguments, R"({"city": "Oslo"})");
    EXPECT_EQ(said.tool_calls[0].id, "call_7_0");
    EXPECT_THAT(said.content, ::testing::StartsWith("Ok."));
    EXPECT_THAT(said.content, ::testing::Not(::testing::HasSubstr("tool_call")));
  }
}

TEST(Answer, NothingOfATextIsLost) {
  const auto format = format_of(narrows::testing::kToolTemplate, true);
  for (const char* text : {"Plain.", "a < b and c", "almost <tool", "", "a\n\n"}) {
    for (const size_t n : {size_t{1}, size_t{1000}}) EXPECT_EQ(pieced(format, text, n).content, text) << n;
  }
  std::string long_text;
  for (int i = 0; i < 5000; ++i) long_text += "word " + std::to_string(i) + " ";
  EXPECT_EQ(pieced(format, long_text, 7).content, long_text);
}

// docs/server_api.md: "An answer that ends before its call does, at max_tokens say"
TEST(Answer, WhatIsCutKeepsWhatItHas) {
  const auto format = format_of(narrows::testing::kToolTemplate, true);
  const std::string whole = std::string("Ok. ") + kCall;
  const ChatMessage said = pieced(format, whole.substr(0, whole.find("slo")), 1);
  EXPECT_THAT(said.content, ::testing::StartsWith("Ok."));
  ASSERT_EQ(said.tool_calls.size(), 1U);
  EXPECT_THAT(said.tool_calls[0].arguments, ::testing::StartsWith(R"({"city": )"));
}

// docs/server_api.md: "else it is reasoning_content, where the template tells it apart"
TEST(Answer, ThinkingIsApart) {
  const auto format = format_of(narrows::testing::kThinkingTemplate, false);
  for (const size_t n : {size_t{1}, size_t{1000}}) {
    const ChatMessage said = pieced(format, "<think>\nhm, 2 < 3\n</think>\n\nyes", n);
    EXPECT_THAT(said.reasoning, ::testing::HasSubstr("hm, 2 < 3"));
    EXPECT_EQ(said.content, "yes");
  }
  EXPECT_EQ(pieced(format, "no thought", 1).content, "no thought");
}

}  // namespace
}  // namespace narrows::server
