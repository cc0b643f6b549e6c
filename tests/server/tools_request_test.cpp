// Tools in requests: what is taken, and what is refused with the name of what is wrong.
#include "server/requests.h"

namespace narrows::server {
namespace {

using ::testing::HasSubstr;

constexpr const char* kWeather =
    R"({"type":"function","function":{"name":"get_weather","description":"d","parameters":)"
    R"({"type":"object","properties":{"city":{"type":"string"}},"required":["city"]},"strict":true}})";
const std::string kTools = std::string(R"("tools":[)") + kWeather + "]";

// docs/server_api.md: "tools, tool_choice, parallel_tool_calls |"
TEST(ToolRequest, ToolsAndChoices) {
  const GenerationRequest r = taken(kOpenAiChat, chat_with(kTools));
  ASSERT_EQ(r.conversation.tools.size(), 1U);
  EXPECT_EQ(r.conversation.tools[0].name, "get_weather");
  EXPECT_EQ(r.conversation.tools[0].description, "d");
  EXPECT_THAT(r.conversation.tools[0].parameters, HasSubstr("city"));
  EXPECT_EQ(r.conversation.tool_choice, ToolChoice::automatic);
  EXPECT_EQ(r.conversation.parallel_tool_calls, std::nullopt);
  EXPECT_TRUE(r.warnings.empty());
  const auto choice = [](const std::string& value) {
    return taken(kOpenAiChat, chat_with(kTools + R"(,"tool_choice":)" + value)).conversation;
  };
  EXPECT_EQ(choice(R"("auto")").tool_choice, ToolChoice::automatic);
  EXPECT_EQ(choice(R"("none")").tool_choice, ToolChoice::none);
  EXPECT_EQ(choice(R"("required")").tool_choice, ToolChoice::required);
  const ChatRequest forced = choice(R"({"type":"function","function":{"name":"get_weather"}})");
  EXPECT_EQ(forced.tool_choice, ToolChoice::required);
  EXPECT_EQ(forced.forced_tool, "get_weather");
  EXPECT_EQ(taken(kOpenAiChat, chat_with(kTools + R"(,"parallel_tool_calls":false)"))
                .conversation.parallel_tool_calls,
            false);
}

// docs/server_api.md: "History: the assistant's tool_calls (and reasoning_content), results as role: tool"
TEST(ToolRequest, CallsAndResultsInTheHistory) {
  const GenerationRequest r = taken(
      kOpenAiChat,
      R"({"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":null,"reasoning_content":"hm",)"
      R"("tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}},)"
      R"({"id":"b","type":"function","function":{"name":"g","arguments":{"y":2}}}]},)"
      R"({"role":"tool","tool_call_id":"b","content":[{"type":"text","text":"two"}]},)"
      R"({"role":"tool","tool_call_id":"a","content":"one"}]})");
  const auto& m = r.conversation.messages;
  ASSERT_EQ(m.size(), 4U);
  EXPECT_EQ(m[1].reasoning, "hm");
  ASSERT_EQ(m[1].tool_calls.size(), 2U);
  EXPECT_EQ(m[1].tool_calls[0].arguments, R"({"x":1})");
  EXPECT_EQ(m[1].tool_calls[1].arguments, R"({"y":2})");
  EXPECT_EQ(m[2].tool_name, "g");
  EXPECT_EQ(m[2].content, "two");
  EXPECT_EQ(m[3].tool_name, "f");
  EXPECT_EQ(m[3].tool_call_id, "a");
}

// docs/server_api.md: "tools are functions with a JSON schema of their arguments", "names of letters, digits
// and _-.:/", "tools and response_format or a grammar exclude each other"
TEST(ToolRequest, WhatIsWrongIsRefusedByName) {
  const auto tool = [](const std::string& function) {
    return R"("tools":[{"type":"function","function":)" + function + "}]";
  };
  const std::pair<std::string, const char*> cases[] = {
      {R"("tools":5)", "tools"},
      {R"("tools":[5])", "tools"},
      {R"("tools":[{"type":"web_search"}])", "tools[0].type"},
      {R"("tools":[{"type":"function"}])", "tools[0].function"},
      {tool("{}"), "name is missing"},
      {tool(R"({"name":""})"), "name is missing"},
      {tool(R"({"name":"a b"})"), "name must have"},
      {tool(R"({"name":"a\"b"})"), "name must have"},
      {tool(R"({"name":"<|im_end|>"})"), "name must have"},
      {tool(R"({"name":"f","parameters":5})"), "parameters"},
      {tool(R"({"name":"f","parameters":{"type":"string"}})"), "object"},
      {tool(R"({"name":"f","parameters":{"type":"foo"}})"), "parameters"},
      {tool(R"({"name":"f","parameters":{"type":"object","properties":{"a":{"$ref":"#/$defs/a"}},)"
            R"("$defs":{"a":{"$ref":"#/$defs/a"}}}})"),
       "leads back to itself"},
      {tool(R"({"name":"f","parameters":{"type":"object","properties":{"a":{"$ref":"#/nowhere"}}}})"),
       "parameters"},
      {tool(R"({"name":"f","parameters":{"type":"object","properties":{"a":{"type":"integer","minimum":5,)"
            R"("maximum":1}}}})"),
       "no integer"},
      {std::string(R"("tools":[)") + kWeather + "," + kWeather + "]", "two of the name"},
      {R"("tools":[{"function":{"name":"a_b"}},{"function":{"name":"a-b"}}])", "too much alike"},
      {kTools + R"(,"tool_choice":"some")", "tool_choice"},
      {kTools + R"(,"tool_choice":5)", "tool_choice"},
      {kTools + R"(,"tool_choice":{"type":"function"})", "tool_choice.function"},
      {kTools + R"(,"tool_choice":{"type":"function","function":{}})", "tool_choice.function.name"},
      {kTools + R"(,"tool_choice":{"type":"function","function":{"name":"nobody"}})", "nobody"},
      {R"("tool_choice":"required")", "tool_choice"},
      {kTools + R"(,"parallel_tool_calls":"yes")", "parallel_tool_calls"},
      {kTools + R"(,"response_format":{"type":"json_object"})", "tools"},
  };
  for (const auto& [fields, word] : cases)
    EXPECT_THAT(refusal(kOpenAiChat, chat_with(fields)), HasSubstr(word)) << fields;
  EXPECT_THAT(refusal(kOpenAiChat, R"({"messages":[{"role":"user","content":"x","tool_calls":[]}]})"),
              HasSubstr("tool_calls"));
  EXPECT_THAT(refusal(kOpenAiChat, R"({"messages":[{"role":"assistant","tool_calls":[{"function":{}}]}]})"),
              HasSubstr("name"));
}

// docs/server_api.md: "What a schema does not enforce here is what it does not enforce in response_format"
TEST(ToolRequest, SchemasTogetherAreBounded) {
  // Each is fine; all of them would take the converter minutes.
  std::string properties;
  for (int i = 0; i < 150; ++i)
    properties += (i > 0 ? "," : "") + std::string("\"p") + std::to_string(i) + R"(":{"type":"string"})";
  std::string tools;
  for (int i = 0; i < 500; ++i)
    tools += (i > 0 ? "," : "") + std::string(R"({"function":{"name":"f)") + std::to_string(i) +
             R"(","parameters":{"type":"object","properties":{)" + properties + "}}}}";
  EXPECT_THAT(refusal(kOpenAiChat, chat_with(R"("tools":[)" + tools + "]")), HasSubstr("too"));
}

}  // namespace
}  // namespace narrows::server
