// Anthropic's dialect: /v1/messages.
#include <fmt/format.h>

#include "server/dialect.h"
#include "server/replies.h"
#include "server/request_parts.h"

namespace narrows::server {

namespace {

constexpr size_t kMaxId = 512;
constexpr size_t kAnyLength = std::string::npos;  ///< the body has its own limit

/// Text of a string or of blocks of text.
std::string text_of(const Json& value, Fields& f, const char* name) {
  if (value.is_string()) return value.get<std::string>();
  std::string text;
  if (!value.is_array()) f.fail(name, fmt::format("must be a string or an array, not {}", kind_of(value)));
  for (size_t i = 0; value.is_array() && i < value.size() && f.ok(); ++i) {
    if (!value[i].is_object()) {
      f.fail(name, fmt::format("holds {}, it must hold objects only", kind_of(value[i])));
      break;
    }
    Fields b(value[i], fmt::format("{}[{}]", name, i));
    if (b.text("type", 64).value_or("") != "text") b.fail("type", "is not text; this server reads text only");
    text += b.text("text", kAnyLength).value_or("");
    for (const char* field : {"cache_control", "citations"}) b.pass(field);
    f.take(b);
  }
  return text;
}

/// The blocks of one message: its results of tools are messages of their own here, before the rest.
class MessageReader {
 public:
  MessageReader(std::string role, std::vector<ChatMessage>& out) : message_{std::move(role), ""}, out_(out) {}

  void block(Fields& b) {
    const std::string type = b.text("type", 64).value_or("");
    const bool of_assistant = message_.role == "assistant";
    b.pass("cache_control");
    if (type == "text") {
      message_.content += b.text("text", kAnyLength).value_or("");
      b.pass("citations");
    } else if (type == "tool_use" && of_assistant) {
      ToolCall call{b.text("id", kMaxId).value_or(""), b.text("name", 128).value_or(""), "{}"};
      if (const Json* input = b.object("input")) call.arguments = input->dump();
      if (call.name.empty()) b.fail("name", "is missing");
      b.pass("caller");
      message_.tool_calls.push_back(std::move(call));
    } else if (type == "tool_result" && !of_assistant) {
      ChatMessage result{"tool", ""};
      result.tool_call_id = b.text("tool_use_id", kMaxId).value_or("");
      if (const Json* content = b.find("content")) result.content = text_of(*content, b, "content");
      if (b.boolean("is_error").value_or(false)) result.content = "Error: " + result.content;
      out_.push_back(std::move(result));
      any_result_ = true;
    } else if (type == "thinking" && of_assistant) {
      message_.reasoning += b.text("thinking", kAnyLength).value_or("");
      b.pass("signature");
    } else if (type == "redacted_thinking" && of_assistant) {
      b.pass("data");
    } else {
      b.fail("type", "is none that this server reads");
    }
  }

  void end() {
    const bool empty = message_.content.empty() && message_.tool_calls.empty();
    if (!any_result_ || !empty) out_.push_back(std::move(message_));
  }
  void content(std::string text) { message_.content = std::move(text); }

 private:
  ChatMessage message_;
  std::vector<ChatMessage>& out_;
  bool any_result_ = false;
};

std::vector<ChatMessage> read_anthropic_messages(Fields& f) {
  std::vector<ChatMessage> out;
  if (const Json* system = f.find("system")) {
    std::string text = text_of(*system, f, "system");
    if (!text.empty()) out.push_back({"system", std::move(text)});
  }
  const Json* list = f.array("messages");
  if (list == nullptr || list->empty() || list->size() > kMaxMessages) {
    f.fail("messages", list == nullptr ? std::string("is missing")
                                       : fmt::format("must have 1 to {} items", kMaxMessages));
    return {};
  }
  for (size_t i = 0; i < list->size() && f.ok(); ++i) {
    const std::string path = fmt::format("messages[{}]", i);
    if (!(*list)[i].is_object()) {
      f.fail("messages", fmt::format("holds {}, it must hold objects only", kind_of((*list)[i])));
      break;
    }
    Fields m((*list)[i], path);
    const std::string role = m.text("role", 64).value_or("");
    if (m.ok() && role != "user" && role != "assistant" && role != "system")
      m.fail("role", "must be user or assistant");
    MessageReader reader(role, out);
    const Json* content = m.find("content");
    if (content == nullptr) {
      m.fail("content", "is missing");
    } else if (content->is_string()) {
      reader.content(content->get<std::string>());
    } else if (!content->is_array()) {
      m.fail("content", fmt::format("must be a string or an array, not {}", kind_of(*content)));
    }
    for (size_t j = 0; content != nullptr && content->is_array() && j < content->size() && m.ok(); ++j) {
      if (!(*content)[j].is_object()) {
        m.fail("content", fmt::format("holds {}, it must hold objects only", kind_of((*content)[j])));
        break;
      }
      Fields b((*content)[j], fmt::format("{}.content[{}]", path, j));
      reader.block(b);
      m.take(b);
    }
    reader.end();
    f.take(m);
  }
  name_results(out);
  return out;
}

void read_anthropic_tools(Fields& f, ChatRequest& chat) {
  read_tool_list(f, chat, [](Fields& t, ChatTool& tool, std::string& /*path*/) {
    if (t.text("type", 64).value_or("custom") != "custom")
      t.fail("type", "is a tool of Anthropic's own servers, which this one does not have");
    tool.name = t.text("name", 128).value_or("");
    tool.description = t.text("description", kMaxGrammarBytes).value_or("");
    if (const Json* schema = t.object("input_schema")) tool.parameters = schema->dump();
    for (const char* field : {"cache_control", "strict", "eager_input_streaming", "defer_loading",
                              "allowed_callers", "input_examples"})
      t.pass(field);
  });
  if (const Json* choice = f.object("tool_choice")) {
    Fields c(*choice, "tool_choice");
    const std::string type = c.text("type", 64).value_or("");
    if (type == "any" || type == "tool") {
      chat.tool_choice = ToolChoice::required;
    } else if (type == "none") {
      chat.tool_choice = ToolChoice::none;
    } else if (type != "auto") {
      c.fail("type", "must be auto, any, tool or none");
    }
    const std::string name = c.text("name", 128).value_or("");
    if (type == "tool") {
      chat.forced_tool = name;
      if (name.empty()) c.fail("name", "is missing");
    }
    if (const auto one = c.boolean("disable_parallel_tool_use")) chat.parallel_tool_calls = !*one;
    f.take(c);
  }
  if (f.ok()) check_tools(f, chat);
}

std::optional<GenerationRequest> parse_with(std::string_view body, const RequestDefaults& defaults,
                                            ApiError& error, bool counts) {
  return read_body<GenerationRequest>(body, error, [&](Fields& f, GenerationRequest& r) {
    r.chat = true;
    r.conversation.messages = read_anthropic_messages(f);
    if (!counts && !f.has("max_tokens")) f.fail("max_tokens", "is missing");
    read_common(f, defaults, r);
    if (r.n > 1) f.fail("n", "is not supported here: one answer a request");
    const auto stops = f.texts("stop_sequences", kMaxStops, kMaxStopBytes);
    if (stops) r.stops.insert(r.stops.end(), stops->begin(), stops->end());
    for (const std::string& stop : r.stops) {
      if (stop.empty()) f.fail("stop_sequences", "must hold no empty string");
    }
    read_anthropic_tools(f, r.conversation);
    const bool calls = !r.conversation.tools.empty() && r.conversation.tool_choice != ToolChoice::none;
    if (calls && !r.grammar.empty()) f.fail("tools", "and a grammar cannot be given together");
    if (const Json* thinking = f.object("thinking")) {
      Fields t(*thinking, "thinking");
      const std::string type = t.text("type", 64).value_or("");
      if (type != "enabled" && type != "disabled" && type != "adaptive")
        t.fail("type", "must be enabled, adaptive or disabled");
      r.conversation.enable_thinking = type != "disabled";
      if (t.integer("budget_tokens", 0, 1'000'000'000) && type == "enabled")
        r.warnings.push_back("thinking.budget_tokens is not enforced by this server");
      t.pass("display");
      f.take(t);
    }
    for (const char* field :
         {"container", "context_management", "mcp_servers", "output_config", "output_format"})
      if (f.has(field)) f.fail(field, "is not supported by this server");
    r.conversation.continue_final = !r.conversation.messages.empty() &&
                                    r.conversation.messages.back().role == "assistant" &&
                                    r.conversation.messages.back().tool_calls.empty();
  });
}

std::optional<GenerationRequest> parse_messages(std::string_view body, const RequestDefaults& defaults,
                                                ApiError& error) {
  return parse_with(body, defaults, error, false);
}
std::optional<GenerationRequest> parse_count(std::string_view body, const RequestDefaults& defaults,
                                             ApiError& error) {
  return parse_with(body, defaults, error, true);
}

const char* error_type(int code) {
  switch (code) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 413:
      return "request_too_large";
    case 429:
      return "rate_limit_error";
    case 503:
      return "overloaded_error";
    default:
      return code < 500 ? "invalid_request_error" : "api_error";
  }
}

Json anthropic_error(const ApiError& e) {
  return {{"type", "error"}, {"error", {{"type", error_type(e.http_code)}, {"message", e.message}}}};
}

class AnthropicReplies : public Replies {
 public:
  using Replies::Replies;

  Json whole() override {
    const Choice& c = choices_.front();
    const ChatMessage& said = c.answer.message();
    Json content = Json::array();
    if (!said.reasoning.empty())
      content.push_back({{"type", "thinking"}, {"thinking", said.reasoning}, {"signature", ""}});
    if (!said.content.empty() || !c.calls()) content.push_back({{"type", "text"}, {"text", said.content}});
    for (const ToolCall& call : said.tool_calls) {
      Json input = Json::parse(call.arguments, nullptr, false);
      if (input.is_discarded()) input = {{"_raw", call.arguments}};  // cut by max_tokens
      content.push_back(
          {{"type", "tool_use"}, {"id", call.id}, {"name", call.name}, {"input", std::move(input)}});
    }
    Json reply = head(std::move(content));
    reply.update(ending(c));
    reply["usage"] = usage_json();
    add_ours(reply, c);
    return reply;
  }

  std::string stream(const Event& event) override {
    if (event.kind == Event::Kind::failed || event.kind == Event::Kind::progress) return {};
    Choice& c = choices_.front();
    std::string out;
    if (!c.begun) {
      c.begun = true;
      Json message = head(Json::array());
      message["stop_reason"] = nullptr;
      message["stop_sequence"] = nullptr;
      message["usage"] = {{"input_tokens", job_.prompts.front().size()}, {"output_tokens", 0}};
      out += event_of({{"type", "message_start"}, {"message", std::move(message)}});
    }
    const AnswerDelta delta = take(event);
    if (!delta.reasoning.empty()) {
      out += open_block("thinking", {{"type", "thinking"}, {"thinking", ""}, {"signature", ""}});
      out += block_delta({{"type", "thinking_delta"}, {"thinking", delta.reasoning}});
    }
    if (!delta.content.empty()) {
      out += open_block("text", {{"type", "text"}, {"text", ""}});
      out += block_delta({{"type", "text_delta"}, {"text", delta.content}});
    }
    for (const AnswerDelta::Call& call : delta.calls) {
      if (call.begins) {
        out += close_block();
        out += open_block(
            "tool_use",
            {{"type", "tool_use"}, {"id", call.id}, {"name", call.name}, {"input", Json::object()}});
      }
      if (!call.arguments.empty())
        out += block_delta({{"type", "input_json_delta"}, {"partial_json", call.arguments}});
    }
    if (event.kind != Event::Kind::finished) return out;
    if (n_blocks_ == 0) out += open_block("text", {{"type", "text"}, {"text", ""}});
    out += close_block();
    Json last = {{"type", "message_delta"}, {"delta", ending(c)}, {"usage", usage_json()}};
    add_ours(last, c);
    return out + event_of(last);
  }
  std::string stream_end() override { return event_of({{"type", "message_stop"}}); }
  std::string stream_error(const ApiError& error) override { return event_of(anthropic_error(error)); }
  std::string ping() const override { return event_of({{"type", "ping"}}); }

 private:
  static std::string event_of(const Json& json) {
    return sse(json, json["type"].get_ref<const std::string&>().c_str());
  }
  Json head(Json content) const {
    return {{"id", job_.id},
            {"type", "message"},
            {"role", "assistant"},
            {"model", context_.model_name},
            {"content", std::move(content)}};
  }
  Json ending(const Choice& c) const {
    const bool stopped = std::string_view(c.result.finish_reason) == "stop";
    const char* reason = !stopped                ? "max_tokens"
                         : c.calls()             ? "tool_use"
                         : c.result.stop.empty() ? "end_turn"
                                                 : "stop_sequence";
    return {{"stop_reason", reason},
            {"stop_sequence", c.result.stop.empty() || c.calls() ? Json() : Json(c.result.stop)}};
  }
  Json usage_json() const {
    const Usage u = usage();
    return {{"input_tokens", u.prompt - u.cached},
            {"cache_creation_input_tokens", 0},
            {"cache_read_input_tokens", u.cached},
            {"output_tokens", u.generated}};
  }
  void add_ours(Json& reply, const Choice& c) const {
    reply["narrows"] = extras_of(job_, c.result);
    if (!job_.request.warnings.empty()) reply["warnings"] = job_.request.warnings;
  }
  /// Goes on with the open block if it is of that type.
  std::string open_block(const char* type, const Json& block) {
    if (open_ == type) return {};
    std::string out = close_block();
    open_ = type;
    return out +
           event_of({{"type", "content_block_start"}, {"index", n_blocks_++}, {"content_block", block}});
  }
  std::string close_block() {
    if (open_.empty()) return {};
    open_.clear();
    return event_of({{"type", "content_block_stop"}, {"index", n_blocks_ - 1}});
  }
  std::string block_delta(const Json& delta) const {
    return event_of({{"type", "content_block_delta"}, {"index", n_blocks_ - 1}, {"delta", delta}});
  }

  std::string open_;  ///< type of the block that has not ended; "": none
  int n_blocks_ = 0;
};

std::unique_ptr<Replies> anthropic_replies(const Job& job, ReplyContext context) {
  return std::make_unique<AnthropicReplies>(job, std::move(context));
}

}  // namespace

const Dialect kAnthropic = {"msg", parse_messages, anthropic_replies, anthropic_error};
const Dialect kAnthropicCount = {"count", parse_count, anthropic_replies, anthropic_error};

}  // namespace narrows::server
