// Tools over HTTP on a tiny model, which calls only because the grammar makes it.
#include <set>

#include "served.h"
#include "text/tool_template.h"

namespace narrows::server {
namespace {

const LoadedTiny& tiny_with_tools() {
  static const LoadedTiny loaded([] {
    TinyModel m;
    m.n_ctx = 8192;
    m.edit_metadata = [](gguf_context* g) {
      gguf_set_val_str(g, "tokenizer.chat_template", narrows::testing::kToolTemplate);
    };
    return m;
  }());
  return loaded;
}

const json kLight = {
    {"type", "function"},
    {"function",
     {{"name", "set_light"},
      {"description", "Switches the light"},
      {"parameters",
       {{"type", "object"}, {"properties", {{"on", {{"type", "boolean"}}}}}, {"required", {"on"}}}}}}};

/// Grammars let spaces come between, and a model that has learned nothing writes no end of them.
const json kNoSpaces = {{"9", -50}, {"10", -50}, {"13", -50}, {"32", -50}};

json asking(const json& fields) {
  json body = {{"messages", {{{"role", "user"}, {"content", "Light!"}}}},
               {"temperature", 0},
               {"max_tokens", 600},
               {"tools", {kLight}},
               {"tool_choice", "required"},
               {"parallel_tool_calls", false},
               {"logit_bias", kNoSpaces}};
  body.update(fields);
  return body;
}

// docs/server_api.md: "The other dialects say the same in their words", "POST /v1/responses | OpenAI's newer
// form", "As OpenAI's, with system_fingerprint and llama.cpp's timings"
TEST(ToolsOverHttp, AForcedCallFollowsItsSchemaInEveryDialect) {
  Served s(tiny_with_tools());
  s.load();
  auto client = s.client();
  const json whole = body_of(client.Post(kChat, asking(json::object()).dump(), kJson));
  ASSERT_TRUE(whole.contains("choices")) << whole;
  const json& choice = whole["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "tool_calls") << whole;
  EXPECT_TRUE(choice["message"]["content"].is_null());
  ASSERT_EQ(choice["message"]["tool_calls"].size(), 1U);
  const json call = choice["message"]["tool_calls"][0];
  EXPECT_EQ(call["function"]["name"], "set_light");
  const std::string arguments = call["function"]["arguments"];
  EXPECT_TRUE(json::parse(arguments)["on"].is_boolean());
  EXPECT_TRUE(whole.contains("timings") && whole.contains("system_fingerprint"));

  // The same in pieces.
  const auto r = client.Post(kChat, asking({{"stream", true}}).dump(), kJson);
  ASSERT_TRUE(r);
  std::string name, pieces, reason, id;
  for (const json& event : events_of(r->body)) {
    if (!event.is_object() || event["choices"].empty()) continue;
    const json& c = event["choices"][0];
    if (!c["finish_reason"].is_null()) reason = c["finish_reason"];
    if (!c["delta"].contains("tool_calls")) continue;
    const json& d = c["delta"]["tool_calls"][0];
    EXPECT_EQ(d["index"], 0);
    if (d["function"].contains("name")) name += d["function"]["name"];
    if (d.contains("id")) id += d["id"];
    pieces += d["function"]["arguments"];
  }
  EXPECT_EQ(name, "set_light");
  EXPECT_EQ(pieces, arguments);
  EXPECT_EQ(reason, "tool_calls");
  EXPECT_FALSE(id.empty());
  EXPECT_NE(id, call["id"]);

  const json function = kLight["function"];
  json anthropic = {
      {"messages", {{{"role", "user"}, {"content", "Light!"}}}},
      {"temperature", 0},
      {"max_tokens", 600},
      {"tools",
       {{{"name", function["name"]},
         {"description", function["description"]},
         {"input_schema", function["parameters"]}}}},
      {"tool_choice", {{"type", "tool"}, {"name", "set_light"}, {"disable_parallel_tool_use", true}}}};
  const json message = body_of(client.Post("/v1/messages", anthropic.dump(), kJson));
  EXPECT_EQ(message["stop_reason"], "tool_use") << message;
  EXPECT_EQ(message["content"].back()["input"], json::parse(arguments));
  EXPECT_GT(body_of(client.Post("/v1/messages/count_tokens", anthropic.dump(), kJson))["input_tokens"], 10);

  json tool = function;
  tool["type"] = "function";
  const json response = body_of(client.Post("/v1/responses",
                                            json({{"input", "Light!"},
                                                  {"temperature", 0},
                                                  {"logit_bias", kNoSpaces},
                                                  {"max_output_tokens", 600},
                                                  {"tools", {tool}},
                                                  {"tool_choice", "required"},
                                                  {"parallel_tool_calls", false}})
                                                .dump(),
                                            kJson));
  EXPECT_EQ(response["output"].back()["type"], "function_call") << response;
  EXPECT_EQ(response["output"].back()["arguments"], arguments);
}

// docs/server_api.md: "POST /api/chat, /api/generate, /api/show", "/api/version | as Ollama's API"
TEST(ToolsOverHttp, WhatIsWrongIsARefusalInTheDialectsWords) {
  Served s(tiny_with_tools());
  s.load();
  auto client = s.client();
  const auto wrong = client.Post(
      kChat, asking({{"tools", {{{"type", "function"}, {"function", json::object()}}}}}).dump(), kJson);
  ASSERT_TRUE(wrong);
  EXPECT_EQ(wrong->status, 400);
  EXPECT_THAT(wrong->body, HasSubstr("name"));
  const auto anthropic = client.Post("/v1/messages", R"({"messages":[]})", kJson);
  EXPECT_EQ(anthropic->status, 400);
  EXPECT_EQ(body_of(anthropic)["type"], "error");
  const auto ollama = client.Post("/api/chat", R"({"messages":[]})", kJson);
  EXPECT_EQ(ollama->status, 400);
  EXPECT_TRUE(body_of(ollama)["error"].is_string());
  EXPECT_EQ(client.Get("/v1/models/tiny")->status, 200);
  EXPECT_EQ(client.Get("/v1/models/other")->status, 404);
  EXPECT_EQ(body_of(client.Get("/api/tags"))["models"][0]["name"], "tiny");
  EXPECT_THAT(body_of(client.Post("/api/show", "{}", kJson))["capabilities"].dump(), HasSubstr("tools"));
  EXPECT_TRUE(body_of(client.Get("/api/version")).contains("version"));
}

// docs/server_api.md: "A model whose template knows no tools refuses them"
TEST(ToolsOverHttp, AModelWhoseTemplateKnowsNoToolsSaysSo) {
  Served s;
  s.load();
  auto client = s.client();
  const auto r = client.Post(kChat, asking(json::object()).dump(), kJson);
  ASSERT_TRUE(r);
  EXPECT_EQ(r->status, 400);
  EXPECT_THAT(r->body, HasSubstr("tools"));
}

TEST(ToolsOverHttp, UnknownFieldsAreNamedInTheReplyAndTheLog) {
  Served s;
  s.load();
  auto client = s.client();
  const json reply = body_of(client.Post(kChat, chat_body(R"("temprature":1)"), kJson));
  EXPECT_THAT(reply["warnings"].dump(), HasSubstr("temprature"));
  EXPECT_THAT(s.log(), HasSubstr("temprature"));
  const auto stream = client.Post(kChat, chat_body(R"("temprature":1,"stream":true)"), kJson);
  EXPECT_THAT(stream->body, HasSubstr("\"warnings\""));
  EXPECT_FALSE(body_of(client.Post(kChat, chat_body(), kJson)).contains("warnings"));
}

// docs/server_api.md: "A session that grows turn by turn reads only what is new"
/// An agent's session: each turn sends all that was said, and reads only what is new.
TEST(ToolsOverHttp, ASessionThatGrowsReadsOnlyWhatIsNew) {
  Served s(tiny_with_tools());
  s.load();
  auto client = s.client();
  json body = asking({{"max_tokens", 200}});
  body["messages"][0]["content"] = std::string(1000, 'q');
  int64_t cached_before = 0;
  for (int turn = 0; turn < 4; ++turn) {
    const json reply = body_of(client.Post(kChat, body.dump(), kJson));
    ASSERT_TRUE(reply.contains("usage")) << reply;
    const int64_t n = reply["usage"]["prompt_tokens"];
    const int64_t cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"];
    if (turn > 0) {
      EXPECT_GT(cached, cached_before) << turn;
      EXPECT_LT(n - cached, 256 + 128 + 700)
          << turn;  // a segment, what it never goes back into, and what is new
    }
    cached_before = cached;
    json said = reply["choices"][0]["message"];
    ASSERT_TRUE(said.contains("tool_calls")) << reply;
    body["messages"].push_back(said);
    body["messages"].push_back({{"role", "tool"},
                                {"tool_call_id", said["tool_calls"][0]["id"]},
                                {"content", std::string(500, static_cast<char>('a' + turn))}});
  }
}

}  // namespace
}  // namespace narrows::server
