// OpenAI's newer dialect: /v1/responses. Nothing is stored: a conversation comes whole with each request.
#include <fmt/format.h>

#include "server/dialect.h"
#include "server/replies.h"
#include "server/request_parts.h"

namespace narrows::server {

namespace {

constexpr size_t kMaxId = 512;
constexpr size_t kAnyLength = std::string::npos;  ///< the body has its own limit

/// Text of a string or of parts.
std::string text_of(const Json* value, Fields& f, const char* name) {
  if (value == nullptr) return {};
  if (value->is_string()) return value->get<std::string>();
  std::string text;
  if (!value->is_array()) f.fail(name, fmt::format("must be a string or an array, not {}", kind_of(*value)));
  for (size_t i = 0; value->is_array() && i < value->size() && f.ok(); ++i) {
    if (!(*value)[i].is_object()) {
      f.fail(name, fmt::format("holds {}, it must hold objects only", kind_of((*value)[i])));
      break;
    }
    Fields p((*value)[i], fmt::format("{}[{}]", name, i));
    const std::string type = p.text("type", 64).value_or("");
    if (type == "refusal") {
      text += p.text("refusal", kAnyLength).value_or("");
    } else if (type == "input_text" || type == "output_text" || type == "text" || type == "summary_text" ||
               type == "reasoning_text") {
      text += p.text("text", kAnyLength).value_or("");
    } else {
      p.fail("type", "is none of text; this server reads text only");
    }
    for (const char* field : {"annotations", "logprobs", "prompt_cache_breakpoint"}) p.pass(field);
    f.take(p);
  }
  return text;
}

/// The assistant's message that an item belongs to: thinking, text and calls of a turn are one message.
ChatMessage& turn(std::vector<ChatMessage>& out) {
  if (out.empty() || out.back().role != "assistant") out.push_back({"assistant", ""});
  return out.back();
}

void read_item(Fields& item, std::vector<ChatMessage>& out) {
  const std::string type = item.text("type", 64).value_or("message");
  for (const char* field : {"id", "status", "phase"}) item.pass(field);
  if (type == "message") {
    std::string role = item.text("role", 64).value_or("");
    if (role == "developer") role = "system";
    if (item.ok() && role != "system" && role != "user" && role != "assistant")
      item.fail("role", "must be system, developer, user or assistant");
    std::string text = text_of(item.find("content"), item, "content");
    if (role != "assistant") {
      out.push_back({std::move(role), std::move(text)});
    } else if (ChatMessage& message = turn(out); message.content.empty() && message.tool_calls.empty()) {
      message.content = std::move(text);
    } else {
      out.push_back({"assistant", std::move(text)});
    }
  } else if (type == "function_call") {
    ToolCall call{item.text("call_id", kMaxId).value_or(""), item.text("name", 128).value_or(""),
                  item.text("arguments", kAnyLength).value_or("{}")};
    if (call.name.empty()) item.fail("name", "is missing");
    if (json_depth(call.arguments) > kMaxJsonDepth) item.fail("arguments", "are nested too deep");
    item.pass("namespace");
    turn(out).tool_calls.push_back(std::move(call));
  } else if (type == "function_call_output") {
    ChatMessage result{"tool", text_of(item.find("output"), item, "output")};
    result.tool_call_id = item.text("call_id", kMaxId).value_or("");
    out.push_back(std::move(result));
  } else if (type == "reasoning") {
    std::string text = text_of(item.find("content"), item, "content");
    if (text.empty()) text = text_of(item.find("summary"), item, "summary");
    item.pass("summary");
    item.pass("encrypted_content");
    if (!out.empty() && out.back().role == "assistant") out.push_back({"assistant", ""});
    turn(out).reasoning += text;
  } else {
    item.fail("type", "is none that this server reads");
  }
}

void read_input(Fields& f, std::vector<ChatMessage>& out) {
  if (const auto instructions = f.text("instructions", kAnyLength); instructions && !instructions->empty())
    out.push_back({"system", *instructions});
  const Json* input = f.find("input");
  if (input == nullptr) {
    f.fail("input", "is missing");
  } else if (input->is_string()) {
    out.push_back({"user", input->get<std::string>()});
  } else if (!input->is_array() || input->empty() || input->size() > kMaxMessages) {
    f.fail("input", fmt::format("must be a string or an array of 1 to {} items", kMaxMessages));
  } else {
    for (size_t i = 0; i < input->size() && f.ok(); ++i) {
      if (!(*input)[i].is_object()) {
        f.fail("input", fmt::format("holds {}, it must hold objects only", kind_of((*input)[i])));
        break;
      }
      Fields item((*input)[i], fmt::format("input[{}]", i));
      read_item(item, out);
      f.take(item);
    }
  }
  name_results(out);
}

void read_response_tools(Fields& f, ChatRequest& chat) {
  read_tool_list(f, chat, [](Fields& t, ChatTool& tool, std::string& /*path*/) {
    if (t.text("type", 64).value_or("") != "function")
      t.fail("type", "must be function; this server has no tools of its own");
    tool.name = t.text("name", 128).value_or("");
    tool.description = t.text("description", kMaxGrammarBytes).value_or("");
    if (const Json* schema = t.object("parameters")) tool.parameters = schema->dump();
    t.pass("strict");
    t.pass("defer_loading");
  });
  if (const Json* choice = f.find("tool_choice")) {
    if (choice->is_object()) {
      Fields c(*choice, "tool_choice");
      if (c.text("type", 64).value_or("") != "function") c.fail("type", "must be function");
      chat.forced_tool = c.text("name", 128).value_or("");
      if (chat.forced_tool.empty()) c.fail("name", "is missing");
      chat.tool_choice = ToolChoice::required;
      f.take(c);
    } else if (*choice == "none") {
      chat.tool_choice = ToolChoice::none;
    } else if (*choice == "required") {
      chat.tool_choice = ToolChoice::required;
    } else if (*choice != "auto") {
      f.fail("tool_choice", "must be auto, none, required or a function");
    }
  }
  if (const auto parallel = f.boolean("parallel_tool_calls")) chat.parallel_tool_calls = *parallel;
  if (f.ok()) check_tools(f, chat);
}

void read_text_format(Fields& f, GenerationRequest& r) {
  const Json* text = f.object("text");
  if (text == nullptr) return;
  Fields t(*text, "text");
  if (t.text("verbosity", 32).value_or("medium") != "medium")
    t.fail("verbosity", "is not supported by this server but for medium");
  if (const Json* format = t.object("format")) {
    Fields g(*format, "text.format");
    const std::string type = g.text("type", 64).value_or("");
    const Json* schema = g.object("schema");
    for (const char* field : {"name", "strict", "description"}) g.pass(field);
    if (type == "json_schema" && schema == nullptr) g.fail("schema", "is missing");
    if (type != "text" && type != "json_object" && type != "json_schema")
      g.fail("type", "must be text, json_object or json_schema");
    t.take(g);
    f.take(t);
    if (f.ok() && type != "text")
      use_schema(f, "text.format", type == "json_schema" ? schema->dump() : R"({"type":"object"})", r);
    return;
  }
  f.take(t);
}

std::optional<GenerationRequest> parse_response(std::string_view body, const RequestDefaults& defaults,
                                                ApiError& error) {
  return read_body<GenerationRequest>(body, error, [&](Fields& f, GenerationRequest& r) {
    r.chat = true;
    read_input(f, r.conversation.messages);
    read_common(f, defaults, r);
    if (r.n > 1) f.fail("n", "is not supported here: one answer a request");
    if (const auto n = f.integer("max_output_tokens", 1, 1'000'000'000)) r.max_tokens = *n;
    read_text_format(f, r);
    read_response_tools(f, r.conversation);
    if (const Json* reasoning = f.object("reasoning")) {
      Fields g(*reasoning, "reasoning");
      const std::string effort = g.text("effort", 32).value_or("");
      if (effort == "none") r.conversation.enable_thinking = false;
      if (!effort.empty() && effort != "none") {
        r.conversation.arguments["reasoning_effort"] = Json(effort).dump();
        r.reasoning_effort = effort;
      }
      for (const char* field : {"summary", "generate_summary"})
        if (g.has(field)) r.warnings.push_back("this server makes no summaries of reasoning: it comes whole");
      f.take(g);
    }
    if (!r.conversation.tools.empty() && r.conversation.tool_choice != ToolChoice::none && !r.grammar.empty())
      f.fail("tools", "and text.format or a grammar cannot be given together");
    if (!r.grammar.empty()) r.conversation.split_reasoning = false;
    for (const char* field :
         {"previous_response_id", "conversation", "prompt", "max_tool_calls", "context_management"})
      if (f.has(field)) f.fail(field, "is not supported by this server, which stores nothing");
    if (f.boolean("background").value_or(false)) f.fail("background", "is not supported by this server");
    if (f.text("truncation", 32).value_or("disabled") != "disabled")
      f.fail("truncation", "is not supported by this server but for disabled");
    if (f.integer("top_logprobs", 0, kMaxTopLogprobs).value_or(0) > 0)
      f.fail("top_logprobs", "is not supported here; /v1/chat/completions has them");
    f.pass("include");
    r.conversation.continue_final = false;
  });
}

class ResponseReplies : public Replies {
 public:
  using Replies::Replies;

  Json whole() override {
    const Choice& c = choices_.front();
    const ChatMessage& said = c.answer.message();
    Json output = Json::array();
    if (!said.reasoning.empty()) output.push_back(reasoning_item(said.reasoning));
    if (!said.content.empty() || !c.calls()) output.push_back(message_item(said.content, "completed"));
    for (size_t i = 0; i < said.tool_calls.size(); ++i)
      output.push_back(call_item(said.tool_calls[i], i, "completed"));
    return ended(std::move(output));
  }

  std::string stream(const Event& event) override {
    if (event.kind == Event::Kind::failed || event.kind == Event::Kind::progress) return {};
    Choice& c = choices_.front();
    std::string out;
    if (!c.begun) {
      c.begun = true;
      const Json begun = response("in_progress", Json::array());
      out += say("response.created", {{"response", begun}});
      out += say("response.in_progress", {{"response", begun}});
    }
    const AnswerDelta delta = take(event);
    const ChatMessage& said = c.answer.message();
    if (!delta.reasoning.empty()) {
      out += open(Kind::reasoning, said);
      out += say("response.reasoning_text.delta", at_part({{"delta", delta.reasoning}}));
    }
    if (!delta.content.empty()) {
      out += open(Kind::message, said);
      out +=
          say("response.output_text.delta", at_part({{"delta", delta.content}, {"logprobs", Json::array()}}));
    }
    for (const AnswerDelta::Call& call : delta.calls) {
      if (call.begins) {
        out += close(said);
        call_ = call.index;
        out += open(Kind::call, said);
      }
      if (!call.arguments.empty())
        out += say("response.function_call_arguments.delta", at_item({{"delta", call.arguments}}));
    }
    if (event.kind != Event::Kind::finished) return out;
    if (n_items_ == 0) out += open(Kind::message, said);
    out += close(said);
    const Json last = ended(items_);
    const std::string status = last["status"].get<std::string>();
    return out + say(("response." + status).c_str(), {{"response", last}});
  }
  std::string stream_end() override { return {}; }
  std::string stream_error(const ApiError& error) override {
    return say("error", {{"code", error.type}, {"message", error.message}, {"param", nullptr}});
  }

 private:
  enum class Kind { none, reasoning, message, call };

  std::string id(const char* kind, size_t i = 0) const {
    return fmt::format("{}_{}_{}", kind, job_.id.substr(job_.id.find('-') + 1), i);
  }
  Json reasoning_item(const std::string& text) const {
    Json content = Json::array({Json{{"type", "reasoning_text"}, {"text", text}}});
    return {{"id", id("rs")}, {"type", "reasoning"}, {"summary", Json::array()}, {"content", content}};
  }
  static Json text_part(const std::string& text) {
    return {
        {"type", "output_text"}, {"text", text}, {"annotations", Json::array()}, {"logprobs", Json::array()}};
  }
  Json message_item(const std::string& text, const char* status) const {
    const bool begins = std::string_view(status) == "in_progress";
    return {{"id", id("msg")},
            {"type", "message"},
            {"status", status},
            {"role", "assistant"},
            {"content", begins ? Json::array() : Json::array({text_part(text)})}};
  }
  Json call_item(const ToolCall& call, size_t i, const char* status) const {
    const bool begins = std::string_view(status) == "in_progress";
    return {{"id", id("fc", i)}, {"type", "function_call"},
            {"status", status},  {"call_id", call.id},
            {"name", call.name}, {"arguments", begins ? std::string() : call.arguments}};
  }

  Json response(const char* status, Json output) const {
    const GenerationRequest& r = job_.request;
    Json tools = Json::array();
    for (const ChatTool& tool : r.conversation.tools)
      tools.push_back({{"type", "function"},
                       {"name", tool.name},
                       {"description", tool.description},
                       {"parameters", Json::parse(tool.parameters)},
                       {"strict", true}});
    const ToolChoice choice = r.conversation.tool_choice;
    Json chosen = choice == ToolChoice::none ? "none" : choice == ToolChoice::required ? "required" : "auto";
    if (!r.conversation.forced_tool.empty())
      chosen = {{"type", "function"}, {"name", r.conversation.forced_tool}};
    return {{"id", job_.id},
            {"object", "response"},
            {"created_at", created_},
            {"status", status},
            {"error", nullptr},
            {"incomplete_details", nullptr},
            {"instructions", nullptr},
            {"max_output_tokens", r.max_tokens ? Json(*r.max_tokens) : Json()},
            {"model", context_.model_name},
            {"output", std::move(output)},
            {"parallel_tool_calls", r.conversation.parallel_tool_calls.value_or(true)},
            {"previous_response_id", nullptr},
            {"store", false},
            {"temperature", r.sampling.temperature},
            {"text", {{"format", {{"type", "text"}}}}},
            {"tool_choice", std::move(chosen)},
            {"tools", std::move(tools)},
            {"top_p", r.sampling.top_p},
            {"truncation", "disabled"},
            {"metadata", Json::object()}};
  }
  Json ended(Json output) const {
    const Choice& c = choices_.front();
    const bool cut = std::string_view(c.result.finish_reason) == "length";
    Json reply = response(cut ? "incomplete" : "completed", std::move(output));
    if (cut) reply["incomplete_details"] = {{"reason", "max_output_tokens"}};
    const Usage u = usage();
    reply["usage"] = {{"input_tokens", u.prompt},
                      {"input_tokens_details", {{"cached_tokens", u.cached}}},
                      {"output_tokens", u.generated},
                      {"output_tokens_details", {{"reasoning_tokens", 0}}},
                      {"total_tokens", u.prompt + u.generated}};
    reply["narrows"] = extras_of(job_, c.result);
    if (!job_.request.warnings.empty()) reply["warnings"] = job_.request.warnings;
    return reply;
  }

  // Streams
  std::string say(const char* type, const Json& fields) {
    Json event = {{"type", type}, {"sequence_number", n_said_++}};
    event.update(fields);
    return sse(event, type);
  }
  std::string open_id() const {
    return open_ == Kind::reasoning ? id("rs") : open_ == Kind::message ? id("msg") : id("fc", call_);
  }
  Json at_item(Json fields) const {
    Json at = {{"item_id", open_id()}, {"output_index", n_items_ - 1}};
    at.update(fields);
    return at;
  }
  Json at_part(Json fields) const {
    Json at = at_item({{"content_index", 0}});
    at.update(fields);
    return at;
  }
  Json open_item(const ChatMessage& said, const char* status) const {
    switch (open_) {
      case Kind::reasoning:
        return reasoning_item(said.reasoning);
      case Kind::call:
        return call_item(said.tool_calls[call_], call_, status);
      default:
        return message_item(said.content, status);
    }
  }
  /// Goes on with the open item if it is of that kind.
  std::string open(Kind kind, const ChatMessage& said) {
    if (open_ == kind) return {};
    std::string out = close(said);
    open_ = kind;
    ++n_items_;
    Json item = open_item(said, "in_progress");
    if (kind == Kind::reasoning) item["content"] = Json::array();
    out += say("response.output_item.added", {{"output_index", n_items_ - 1}, {"item", std::move(item)}});
    if (kind == Kind::message) out += say("response.content_part.added", at_part({{"part", text_part("")}}));
    return out;
  }
  std::string close(const ChatMessage& said) {
    if (open_ == Kind::none) return {};
    std::string out;
    if (open_ == Kind::reasoning)
      out += say("response.reasoning_text.done", at_part({{"text", said.reasoning}}));
    if (open_ == Kind::message) {
      out += say("response.output_text.done", at_part({{"text", said.content}, {"logprobs", Json::array()}}));
      out += say("response.content_part.done", at_part({{"part", text_part(said.content)}}));
    }
    if (open_ == Kind::call)
      out += say(
          "response.function_call_arguments.done",
          at_item({{"arguments", said.tool_calls[call_].arguments}, {"name", said.tool_calls[call_].name}}));
    Json item = open_item(said, "completed");
    out += say("response.output_item.done", {{"output_index", n_items_ - 1}, {"item", item}});
    items_.push_back(std::move(item));
    open_ = Kind::none;
    return out;
  }

  Kind open_ = Kind::none;
  size_t call_ = 0;  ///< index of the call that is open, or was last
  int n_items_ = 0;
  int n_said_ = 0;
  Json items_ = Json::array();
};

std::unique_ptr<Replies> response_replies(const Job& job, ReplyContext context) {
  return std::make_unique<ResponseReplies>(job, std::move(context));
}

}  // namespace

const Dialect kResponses = {"resp", parse_response, response_replies, openai_error};

}  // namespace narrows::server
