// Ollama's dialect: /api/chat and /api/generate. Streams are lines of JSON, and are what is given unless a
// request asks for a whole reply.
#include <fmt/chrono.h>
#include <fmt/format.h>

#include <chrono>

#include "server/dialect.h"
#include "server/replies.h"
#include "server/request_parts.h"

namespace narrows::server {

namespace {

constexpr size_t kAnyLength = std::string::npos;  ///< the body has its own limit

/// `options`, whose names are llama.cpp's.
void read_options(Fields& f, const RequestDefaults& defaults, GenerationRequest& r) {
  static const Json kNone = Json::object();
  const Json* given = f.object("options");
  Fields o(given != nullptr ? *given : kNone, "options");
  read_common(o, defaults, r);
  const auto n = o.integer("num_predict", -2, 1'000'000'000);
  if (n) r.max_tokens = *n < 0 ? std::nullopt : n;  // -1 and -2: as many as the context has
  if (const auto n_ctx = o.integer("num_ctx", 1, 1'000'000'000); n_ctx && *n_ctx > defaults.n_ctx)
    r.warnings.push_back(
        fmt::format("options.num_ctx is {}, this server's context has {} tokens", *n_ctx, defaults.n_ctx));
  // What concerns the process that runs the model, or a shift of the context that is not done here.
  for (const char* name : {"num_keep", "num_batch", "num_gpu", "main_gpu", "low_vram", "use_mmap",
                           "use_mlock", "num_thread", "numa", "f16_kv", "vocab_only", "penalize_newline"})
    o.pass(name);
  if (o.number("tfs_z", 0, 100).value_or(1) != 1)
    o.fail("tfs_z", "is not supported by this server but for 1");
  f.take(o);
  r.model = f.text("model", 1024).value_or("");
  r.stream = f.boolean("stream").value_or(true);
  if (r.n > 1) f.fail("options", "has n, which is not supported here: one answer a request");
  f.pass("keep_alive");
  if (const Json* format = f.find("format")) {
    if (format->is_object()) {
      use_schema(f, "format", format->dump(), r);
    } else if (*format == "json") {
      use_schema(f, "format", R"({"type":"object"})", r);
    } else if (*format != "") {
      f.fail("format", "must be json or a schema");
    }
  }
  if (const Json* think = f.find("think")) {
    if (think->is_boolean()) {
      r.conversation.enable_thinking = think->get<bool>();
    } else if (think->is_string()) {
      r.conversation.enable_thinking = true;
      r.conversation.arguments["reasoning_effort"] = think->dump();
      r.reasoning_effort = think->get<std::string>();
    } else {
      f.fail("think", "must be true, false or a text");
    }
  }
  for (const char* name : {"images", "logprobs", "top_logprobs", "shift", "truncate"}) {
    const Json* value = f.find(name);
    if (value != nullptr && *value != false && !(value->is_array() && value->empty()) && *value != 0)
      f.fail(name, "is not supported by this server");
  }
  if (!r.grammar.empty()) r.conversation.split_reasoning = false;
}

std::vector<ChatMessage> read_ollama_messages(Fields& f) {
  std::vector<ChatMessage> out;
  const Json* list = f.array("messages");
  if (list == nullptr || list->empty() || list->size() > kMaxMessages) {
    f.fail("messages", list == nullptr ? std::string("is missing")
                                       : fmt::format("must have 1 to {} items", kMaxMessages));
    return out;
  }
  for (size_t i = 0; i < list->size() && f.ok(); ++i) {
    const std::string path = fmt::format("messages[{}]", i);
    if (!(*list)[i].is_object()) {
      f.fail("messages", fmt::format("holds {}, it must hold objects only", kind_of((*list)[i])));
      break;
    }
    Fields m((*list)[i], path);
    ChatMessage message{m.text("role", 64).value_or(""), m.text("content", kAnyLength).value_or("")};
    if (m.ok() && message.role != "system" && message.role != "user" && message.role != "assistant" &&
        message.role != "tool")
      m.fail("role", "must be system, user, assistant or tool");
    message.reasoning = m.text("thinking", kAnyLength).value_or("");
    message.tool_name = m.text("tool_name", 128).value_or("");
    message.tool_call_id = m.text("tool_call_id", 512).value_or("");
    const Json* images = m.array("images");
    if (images != nullptr && !images->empty()) m.fail("images", "are not read by this server");
    const Json* calls = m.array("tool_calls");
    for (size_t j = 0; calls != nullptr && j < calls->size() && j < kMaxTools && m.ok(); ++j) {
      const Json& call = (*calls)[j];
      const auto function = call.is_object() ? call.find("function") : call.end();
      const bool good = call.is_object() && function != call.end() && function->is_object() &&
                        function->contains("name") && (*function)["name"].is_string();
      if (!good) {
        m.fail("tool_calls", "holds something that is no call of a function");
        break;
      }
      ToolCall added{"", (*function)["name"].get<std::string>(), "{}"};
      if (call.contains("id") && call["id"].is_string()) added.id = call["id"].get<std::string>();
      const auto arguments = function->find("arguments");
      if (arguments != function->end() && arguments->is_object()) added.arguments = arguments->dump();
      message.tool_calls.push_back(std::move(added));
    }
    f.take(m);
    out.push_back(std::move(message));
  }
  name_results(out);
  return out;
}

std::optional<GenerationRequest> parse_ollama_chat(std::string_view body, const RequestDefaults& defaults,
                                                   ApiError& error) {
  return read_body<GenerationRequest>(body, error, [&](Fields& f, GenerationRequest& r) {
    r.chat = true;
    r.conversation.messages = read_ollama_messages(f);
    read_options(f, defaults, r);
    read_tools(f, r.conversation);
    if (!r.conversation.tools.empty() && r.conversation.tool_choice != ToolChoice::none && !r.grammar.empty())
      f.fail("tools", "and format or a grammar cannot be given together");
    r.conversation.continue_final = !r.conversation.messages.empty() &&
                                    r.conversation.messages.back().role == "assistant" &&
                                    r.conversation.messages.back().tool_calls.empty();
  });
}

/// A question through the model's template, or bare text (raw).
std::optional<GenerationRequest> parse_ollama_generate(std::string_view body, const RequestDefaults& defaults,
                                                       ApiError& error) {
  return read_body<GenerationRequest>(body, error, [&](Fields& f, GenerationRequest& r) {
    const std::string prompt = f.text("prompt", kAnyLength).value_or("");
    if (f.ok() && prompt.empty()) f.fail("prompt", "is missing");
    const auto system = f.text("system", kAnyLength);
    r.chat = !f.boolean("raw").value_or(false);
    if (r.chat) {
      if (system && !system->empty()) r.conversation.messages.push_back({"system", *system});
      r.conversation.messages.push_back({"user", prompt});
    } else {
      r.prompts.push_back({prompt, {}, false});
    }
    read_options(f, defaults, r);
    for (const char* name : {"suffix", "template", "context"}) {
      const Json* value = f.find(name);
      const bool empty = value == nullptr || *value == "" || (value->is_array() && value->empty());
      if (!empty) f.fail(name, "is not supported by this server");
    }
  });
}

Json ollama_error(const ApiError& e) { return {{"error", e.message}}; }

/// Both endpoints: `generate` says `response` where the other has a message.
class OllamaReplies : public Replies {
 public:
  OllamaReplies(const Job& job, ReplyContext context, bool generate)
      : Replies(job, std::move(context)), generate_(generate) {}

  Json whole() override {
    const Choice& c = choices_.front();
    Json reply = head();
    say(reply, c.answer.message());
    end(reply, c);
    return reply;
  }

  std::string stream(const Event& event) override {
    if (event.kind == Event::Kind::failed || event.kind == Event::Kind::progress) return {};
    Choice& c = choices_.front();
    const AnswerDelta delta = take(event);
    std::string out;
    if (!delta.content.empty() || !delta.reasoning.empty()) {
      ChatMessage news{"assistant", delta.content};
      news.reasoning = delta.reasoning;
      Json reply = head();
      say(reply, news);
      reply["done"] = false;
      out += dump(reply) + "\n";
    }
    if (event.kind != Event::Kind::finished) return out;
    // Calls come whole.
    ChatMessage calls{"assistant", ""};
    calls.tool_calls = c.answer.message().tool_calls;
    if (!calls.tool_calls.empty()) {
      Json reply = head();
      say(reply, calls);
      reply["done"] = false;
      out += dump(reply) + "\n";
    }
    Json last = head();
    say(last, ChatMessage{"assistant", ""});
    end(last, c);
    return out + dump(last) + "\n";
  }
  std::string stream_end() override { return {}; }
  std::string stream_error(const ApiError& error) override { return dump(ollama_error(error)) + "\n"; }
  std::string ping() const override { return {}; }
  const char* content_type() const override { return "application/x-ndjson"; }

 private:
  Json head() const {
    const auto now = std::chrono::system_clock::now();
    const auto us = std::chrono::duration_cast<std::chrono::microseconds>(now.time_since_epoch()).count();
    return {
        {"model", context_.model_name},
        {"created_at", fmt::format("{:%Y-%m-%dT%H:%M:%S}.{:06}Z",
                                   fmt::gmtime(std::chrono::system_clock::to_time_t(now)), us % 1'000'000)}};
  }
  void say(Json& reply, const ChatMessage& said) const {
    if (generate_) {
      reply["response"] = said.content;
      if (!said.reasoning.empty()) reply["thinking"] = said.reasoning;
      return;
    }
    Json message = {{"role", "assistant"}, {"content", said.content}};
    if (!said.reasoning.empty()) message["thinking"] = said.reasoning;
    for (size_t i = 0; i < said.tool_calls.size(); ++i) {
      const ToolCall& call = said.tool_calls[i];
      Json arguments = Json::parse(call.arguments, nullptr, false);
      if (!arguments.is_object()) arguments = {{"_raw", call.arguments}};  // cut by num_predict
      message["tool_calls"].push_back(
          {{"id", call.id},
           {"function", {{"index", i}, {"name", call.name}, {"arguments", std::move(arguments)}}}});
    }
    reply["message"] = std::move(message);
  }
  void end(Json& reply, const Choice& c) const {
    const ChoiceResult& r = c.result;
    const auto ns = [](double s) { return static_cast<int64_t>(s * 1e9); };
    reply["done"] = true;
    reply["done_reason"] = r.finish_reason;
    reply["total_duration"] = ns(r.queue_s + r.prefill_s + r.decode_s);
    reply["load_duration"] = 0;
    reply["prompt_eval_count"] = r.n_prompt;
    reply["prompt_eval_duration"] = ns(r.prefill_s);
    reply["eval_count"] = r.n_generated;
    reply["eval_duration"] = ns(r.decode_s);
    reply["narrows"] = extras_of(job_, r);
    if (!job_.request.warnings.empty()) reply["warnings"] = job_.request.warnings;
  }

  bool generate_;
};

std::unique_ptr<Replies> chat_replies(const Job& job, ReplyContext context) {
  return std::make_unique<OllamaReplies>(job, std::move(context), false);
}
std::unique_ptr<Replies> generate_replies(const Job& job, ReplyContext context) {
  return std::make_unique<OllamaReplies>(job, std::move(context), true);
}

}  // namespace

const Dialect kOllamaChat = {"ollama", parse_ollama_chat, chat_replies, ollama_error};
const Dialect kOllamaGenerate = {"ollama", parse_ollama_generate, generate_replies, ollama_error};

}  // namespace narrows::server
