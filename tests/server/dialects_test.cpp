// Each dialect: what its bodies mean in the common words, and what it says of a job's events.
#include <nlohmann/json.hpp>
#include <sstream>

#include "server/replies.h"
#include "server/requests.h"

namespace narrows::server {
namespace {

using ::testing::HasSubstr;

std::unique_ptr<Job> job_of(const Dialect& dialect, const std::string& body) {
  auto job = std::make_unique<Job>();
  job->id = "x-12";
  job->request = taken(dialect, body);
  job->prompts = {{1, 2, 3}};
  return job;
}

std::vector<Event> events_of_an_answer(const char* reason = "stop", const std::string& stop = "") {
  std::vector<Event> events(3);
  events[0].text = "Hel";
  events[1].text = "lo";
  events[2].kind = Event::Kind::finished;
  events[2].result.finish_reason = reason;
  events[2].result.stop = stop;
  events[2].result.n_prompt = 3;
  events[2].result.n_cached = 1;
  events[2].result.n_generated = 2;
  return events;
}

Json whole_of(const Dialect& dialect, const Job& job, const std::vector<Event>& events) {
  const auto replies = dialect.replies(job, {"m", "f"});
  for (const Event& event : events) replies->add(event);
  return replies->whole();
}

/// The JSON of all events of a stream.
std::vector<Json> streamed(const Dialect& dialect, const Job& job, const std::vector<Event>& events) {
  const auto replies = dialect.replies(job, {"m", "f"});
  std::string text;
  for (const Event& event : events) text += replies->stream(event);
  text += replies->stream_end();
  std::vector<Json> all;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("data: ", 0) == 0) line = line.substr(6);
    if (!line.empty() && line[0] == '{') all.push_back(Json::parse(line));
  }
  return all;
}

const std::string kAnthropicBody =
    R"({"model":"m","max_tokens":9,"system":[{"type":"text","text":"Be kind.","cache_control":{"type":"ephemeral"}}],)"
    R"("messages":[{"role":"user","content":"hi"},{"role":"assistant","content":[{"type":"thinking","thinking":"hm",)"
    R"("signature":"s"},{"type":"text","text":"I look."},{"type":"tool_use","id":"t1","name":"f","input":{"a":1}}]},)"
    R"({"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":[{"type":"text","text":"two"}]},)"
    R"({"type":"text","text":"and?"}]}],"tools":[{"name":"f","description":"d","input_schema":{"type":"object",)"
    R"("properties":{"a":{"type":"integer"}}}}],"tool_choice":{"type":"any","disable_parallel_tool_use":true},)"
    R"("stop_sequences":["END"],"temperature":0.5,"metadata":{"user_id":"u"}})";

// docs/server_api.md: "Anthropic: blocks of text, tool_use, tool_result and thinking"
TEST(Anthropic, Requests) {
  const GenerationRequest r = taken(kAnthropic, kAnthropicBody);
  const auto& m = r.conversation.messages;
  ASSERT_EQ(m.size(), 5U);
  EXPECT_EQ(m[0].role, "system");
  EXPECT_EQ(m[0].content, "Be kind.");
  EXPECT_EQ(m[2].reasoning, "hm");
  EXPECT_EQ(m[2].content, "I look.");
  ASSERT_EQ(m[2].tool_calls.size(), 1U);
  EXPECT_EQ(m[2].tool_calls[0].arguments, R"({"a":1})");
  EXPECT_EQ(m[3].role, "tool");
  EXPECT_EQ(m[3].content, "two");
  EXPECT_EQ(m[3].tool_name, "f");
  EXPECT_EQ(m[4].content, "and?");
  EXPECT_EQ(r.conversation.tool_choice, ToolChoice::required);
  EXPECT_EQ(r.conversation.parallel_tool_calls, false);
  EXPECT_EQ(r.stops, std::vector<std::string>{"END"});
  EXPECT_EQ(r.max_tokens, 9);
  EXPECT_TRUE(r.warnings.empty()) << r.warnings.front();
  const auto body = [](const std::string& fields) {
    return R"({"max_tokens":5,"messages":[{"role":"user","content":"x"}],)" + fields + "}";
  };
  EXPECT_THAT(refusal(kAnthropic, R"({"messages":[{"role":"user","content":"x"}]})"),
              HasSubstr("max_tokens"));
  EXPECT_EQ(refusal(kAnthropicCount, R"({"messages":[{"role":"user","content":"x"}]})"), "");
  EXPECT_THAT(
      refusal(kAnthropic, R"({"max_tokens":5,"messages":[{"role":"user","content":[{"type":"image"}]}]})"),
      HasSubstr("messages[0].content[0].type"));
  EXPECT_THAT(refusal(kAnthropic, body(R"("tools":[{"type":"bash_20250124","name":"bash"}])")),
              HasSubstr("type"));
  EXPECT_THAT(refusal(kAnthropic, body(R"("tools":[{}])")), HasSubstr("name"));
  EXPECT_THAT(refusal(kAnthropic, body(R"("tool_choice":{"type":"tool","name":"g"})")),
              HasSubstr("tool_choice"));
  EXPECT_THAT(refusal(kAnthropic, body(R"("mcp_servers":[{}])")), HasSubstr("mcp_servers"));
}

// docs/server_api.md: "input_tokens are those that were not cached", "/v1/messages/count_tokens | as
// Anthropic's API"
TEST(Anthropic, Replies) {
  const auto job = job_of(kAnthropic, R"({"max_tokens":5,"messages":[{"role":"user","content":"x"}]})");
  const Json whole = whole_of(kAnthropic, *job, events_of_an_answer());
  EXPECT_EQ(whole["type"], "message");
  EXPECT_EQ(whole["content"][0]["text"], "Hello");
  EXPECT_EQ(whole["stop_reason"], "end_turn");
  EXPECT_EQ(whole["usage"]["input_tokens"], 2);
  EXPECT_EQ(whole["usage"]["cache_read_input_tokens"], 1);
  EXPECT_EQ(whole["usage"]["output_tokens"], 2);
  EXPECT_EQ(whole_of(kAnthropic, *job, events_of_an_answer("length"))["stop_reason"], "max_tokens");
  const Json stopped = whole_of(kAnthropic, *job, events_of_an_answer("stop", "END"));
  EXPECT_EQ(stopped["stop_reason"], "stop_sequence");
  EXPECT_EQ(stopped["stop_sequence"], "END");

  std::vector<std::string> types;
  for (const Json& event : streamed(kAnthropic, *job, events_of_an_answer()))
    types.push_back(event["type"].get<std::string>());
  EXPECT_EQ(types, (std::vector<std::string>{"message_start", "content_block_start", "content_block_delta",
                                             "content_block_delta", "content_block_stop", "message_delta",
                                             "message_stop"}));
  EXPECT_EQ(kAnthropic.error(http_error(429, "full"))["error"]["type"], "rate_limit_error");
}

// docs/server_api.md: "Responses: items of messages, function calls", "previous_response_id, background,
// truncation and tools of OpenAI's own are refused", "nothing is stored"
TEST(Responses, Requests) {
  const GenerationRequest r = taken(
      kResponses,
      R"({"model":"m","instructions":"Be kind.","input":[{"role":"user","content":[{"type":"input_text","text":"hi"}]},)"
      R"({"type":"reasoning","id":"r","summary":[],"content":[{"type":"reasoning_text","text":"hm"}]},)"
      R"({"type":"function_call","call_id":"c","name":"f","arguments":"{}","id":"fc","status":"completed"},)"
      R"({"type":"function_call_output","call_id":"c","output":"two"}],"max_output_tokens":9,)"
      R"("tools":[{"type":"function","name":"f","parameters":{"type":"object","properties":{}},"strict":true}],)"
      R"("tool_choice":{"type":"function","name":"f"},"store":true,"include":[]})");
  const auto& m = r.conversation.messages;
  ASSERT_EQ(m.size(), 4U);
  EXPECT_EQ(m[0].role, "system");
  EXPECT_EQ(m[2].reasoning, "hm");
  ASSERT_EQ(m[2].tool_calls.size(), 1U);
  EXPECT_EQ(m[3].role, "tool");
  EXPECT_EQ(m[3].tool_name, "f");
  EXPECT_EQ(r.conversation.forced_tool, "f");
  EXPECT_EQ(r.max_tokens, 9);
  EXPECT_TRUE(r.warnings.empty()) << r.warnings.front();
  EXPECT_THAT(taken(kResponses, R"({"input":"x","text":{"format":{"type":"json_schema","name":"n","schema":)"
                                R"({"type":"object","properties":{"zebra":{"type":"integer"}}}}}})")
                  .grammar,
              HasSubstr("zebra"));
  for (const char* body :
       {R"({"input":"x","previous_response_id":"y"})", R"({"input":"x","background":true})",
        R"({"input":"x","truncation":"auto"})", R"({"input":5})", R"({})",
        R"({"input":[{"type":"item_reference"}]})", R"({"input":"x","tools":[{"type":"web_search"}]})",
        R"({"input":"x","top_logprobs":3})"})
    EXPECT_NE(refusal(kResponses, body), "") << body;
}

TEST(Responses, Replies) {
  const auto job = job_of(kResponses, R"({"input":"x"})");
  const Json whole = whole_of(kResponses, *job, events_of_an_answer());
  EXPECT_EQ(whole["status"], "completed");
  EXPECT_EQ(whole["output"][0]["content"][0]["text"], "Hello");
  EXPECT_EQ(whole["usage"]["input_tokens"], 3);
  EXPECT_EQ(whole["usage"]["input_tokens_details"]["cached_tokens"], 1);
  EXPECT_EQ(whole_of(kResponses, *job, events_of_an_answer("length"))["status"], "incomplete");
  std::vector<std::string> types;
  int number = 0;
  for (const Json& event : streamed(kResponses, *job, events_of_an_answer())) {
    types.push_back(event["type"].get<std::string>());
    EXPECT_EQ(event["sequence_number"], number++);
  }
  EXPECT_EQ(types, (std::vector<std::string>{"response.created", "response.in_progress",
                                             "response.output_item.added", "response.content_part.added",
                                             "response.output_text.delta", "response.output_text.delta",
                                             "response.output_text.done", "response.content_part.done",
                                             "response.output_item.done", "response.completed"}));
}

// docs/server_api.md: "Ollama: options have llama.cpp's names"
TEST(Ollama, Requests) {
  const GenerationRequest r = taken(
      kOllamaChat,
      R"({"model":"m","messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"","tool_calls":)"
      R"([{"function":{"name":"f","arguments":{"a":1}}}]},{"role":"tool","tool_name":"f","content":"two"}],)"
      R"("options":{"temperature":0.25,"num_predict":-1,"top_k":7,"seed":3,"stop":["x"],"num_ctx":2048},)"
      R"("keep_alive":"5m","think":false})");
  EXPECT_TRUE(r.stream);  // unless it says otherwise
  EXPECT_FLOAT_EQ(r.sampling.temperature, 0.25F);
  EXPECT_EQ(r.sampling.top_k, 7);
  EXPECT_EQ(r.max_tokens, std::nullopt);
  EXPECT_EQ(r.conversation.messages[1].tool_calls[0].arguments, R"({"a":1})");
  EXPECT_EQ(r.conversation.enable_thinking, false);
  EXPECT_TRUE(r.warnings.empty()) << r.warnings.front();
  EXPECT_FALSE(
      taken(kOllamaChat, R"({"messages":[{"role":"user","content":"x"}],"options":{"num_ctx":99999999}})")
          .warnings.empty());
  const GenerationRequest raw = taken(kOllamaGenerate, R"({"prompt":"Once","raw":true,"stream":false})");
  EXPECT_FALSE(raw.chat || raw.stream);
  EXPECT_EQ(raw.prompts[0].text, "Once");
  EXPECT_EQ(taken(kOllamaGenerate, R"({"prompt":"p","system":"s"})").conversation.messages.size(), 2U);
  EXPECT_THAT(taken(kOllamaGenerate, R"({"prompt":"p","format":"json"})").grammar, HasSubstr("root"));
  for (const char* body : {R"({"prompt":"p","images":["x"]})", R"({"prompt":"p","context":[1]})",
                           R"({"prompt":"p","template":"t"})", R"({"prompt":"p","format":"xml"})", R"({})",
                           R"({"prompt":"p","options":{"temperature":-1}})"})
    EXPECT_NE(refusal(kOllamaGenerate, body), "") << body;
}

// docs/server_api.md: "calls come whole in a stream"
TEST(Ollama, Replies) {
  const auto job = job_of(kOllamaChat, R"({"messages":[{"role":"user","content":"x"}]})");
  const Json whole = whole_of(kOllamaChat, *job, events_of_an_answer());
  EXPECT_EQ(whole["message"]["content"], "Hello");
  EXPECT_EQ(whole["done"], true);
  EXPECT_EQ(whole["done_reason"], "stop");
  EXPECT_EQ(whole["prompt_eval_count"], 3);
  const auto lines = streamed(kOllamaChat, *job, events_of_an_answer());
  ASSERT_EQ(lines.size(), 3U);
  EXPECT_EQ(lines[0]["message"]["content"], "Hel");
  EXPECT_EQ(lines[0]["done"], false);
  EXPECT_EQ(lines[2]["done"], true);
  const auto generate = job_of(kOllamaGenerate, R"({"prompt":"x"})");
  EXPECT_EQ(whole_of(kOllamaGenerate, *generate, events_of_an_answer())["response"], "Hello");
}

}  // namespace
}  // namespace narrows::server
