// OpenAI's dialect: /v1/chat/completions and /v1/completions.
#include <algorithm>

#include "base/utf8.h"
#include "server/dialect.h"
#include "server/replies.h"

namespace narrows::server {

namespace {

/// Bytes of a token as text: what is no character on its own as U+FFFD.
std::string as_text(const std::string& bytes) {
  Utf8Stream stream;
  return stream.push(bytes) + stream.flush();
}

Json bytes_of(const std::string& piece) {
  Json bytes = Json::array();
  for (const char c : piece) bytes.push_back(static_cast<unsigned char>(c));
  return bytes;
}

/// Calls in a message.
Json calls_of(const ChatMessage& message) {
  Json list = Json::array();
  for (const ToolCall& call : message.tool_calls)
    list.push_back({{"id", call.id},
                    {"type", "function"},
                    {"function", {{"name", call.name}, {"arguments", call.arguments}}}});
  return list;
}

Json call_deltas(const AnswerDelta& delta) {
  Json list = Json::array();
  for (const AnswerDelta::Call& call : delta.calls) {
    Json out = {{"index", call.index}};
    Json function = Json::object();
    if (call.begins) {
      out["id"] = call.id;
      out["type"] = "function";
      function["name"] = call.name;
    }
    function["arguments"] = call.arguments;
    out["function"] = std::move(function);
    list.push_back(std::move(out));
  }
  return list;
}

class OpenAiReplies : public Replies {
 public:
  using Replies::Replies;

  Json whole() override;
  std::string stream(const Event& event) override;
  std::string stream_end() override;
  std::string stream_error(const ApiError& error) override { return sse(openai_error(error)); }

 private:
  Json head(const char* object) const;
  Json usage_json() const;
  Json logprobs(const std::vector<TokenLogprob>& tokens, int64_t offset) const;
  /// Where the tokens of a choice begin in its text. A prompt's may have more bytes than it (a token that the
  /// file puts before it, a space): they end where it ends.
  int64_t first_offset(size_t choice, const std::vector<TokenLogprob>& tokens) const;
  const char* reason(const Choice& c) const;
  Json chunk(int index, Choice& c, Json choice);
  Json progress(const Event& event) const;
  const std::string& prompt_text(size_t choice) const {
    return job_.request.prompts[choice / static_cast<size_t>(job_.request.n)].text;
  }
  bool chat() const { return job_.request.chat; }
};

Json OpenAiReplies::head(const char* object) const {
  return {{"id", job_.id},
          {"object", object},
          {"created", created_},
          {"model", context_.model_name},
          {"system_fingerprint", context_.fingerprint}};
}

Json OpenAiReplies::usage_json() const {
  const Usage u = usage();
  return {{"prompt_tokens", u.prompt},
          {"completion_tokens", u.generated},
          {"total_tokens", u.prompt + u.generated},
          {"prompt_tokens_details", {{"cached_tokens", u.cached}}}};
}

const char* OpenAiReplies::reason(const Choice& c) const {
  const bool stopped = std::string_view(c.result.finish_reason) == "stop";
  return stopped && c.calls() ? "tool_calls" : c.result.finish_reason;
}

int64_t OpenAiReplies::first_offset(size_t choice, const std::vector<TokenLogprob>& tokens) const {
  if (!job_.request.echo || tokens.empty() || !tokens.front().is_first) return 0;
  auto offset = static_cast<int64_t>(prompt_text(choice).size());
  for (size_t i = 0; i < job_.prompt_of(static_cast<int>(choice)).size(); ++i)
    offset -= static_cast<int64_t>(tokens[i].piece.size());
  return offset;
}

Json OpenAiReplies::logprobs(const std::vector<TokenLogprob>& tokens, int64_t offset) const {
  if (!job_.request.logprobs) return nullptr;
  if (chat()) {
    Json content = Json::array();
    for (const TokenLogprob& t : tokens) {
      Json top = Json::array();
      for (const auto& a : t.top)
        top.push_back({{"token", as_text(a.piece)}, {"logprob", a.logprob}, {"bytes", bytes_of(a.piece)}});
      content.push_back({{"token", as_text(t.piece)},
                         {"logprob", t.logprob},
                         {"bytes", bytes_of(t.piece)},
                         {"top_logprobs", std::move(top)}});
    }
    return {{"content", std::move(content)}};
  }
  Json names = Json::array();
  Json values = Json::array();
  Json tops = Json::array();
  Json offsets = Json::array();
  for (const TokenLogprob& t : tokens) {
    names.push_back(as_text(t.piece));
    values.push_back(t.is_first ? Json() : Json(t.logprob));
    Json top = t.is_first ? Json() : Json::object();
    for (const auto& a : t.top) top[as_text(a.piece)] = a.logprob;
    tops.push_back(std::move(top));
    offsets.push_back(std::max<int64_t>(offset, 0));
    offset += static_cast<int64_t>(t.piece.size());
  }
  return {{"tokens", std::move(names)},
          {"token_logprobs", std::move(values)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

Json OpenAiReplies::whole() {
  Json reply = head(chat() ? "chat.completion" : "text_completion");
  Json list = Json::array();
  Json ours = Json::array();
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& c = choices_[i];
    const ChatMessage& said = c.answer.message();
    Json choice = {{"index", i}};
    if (chat()) {
      Json message = {{"role", "assistant"}, {"content", said.content}};
      if (said.content.empty() && c.calls()) message["content"] = nullptr;
      if (!said.reasoning.empty()) message["reasoning_content"] = said.reasoning;
      if (c.calls()) message["tool_calls"] = calls_of(said);
      choice["message"] = std::move(message);
    } else {
      choice["text"] = job_.request.echo ? prompt_text(i) + said.content : said.content;
    }
    choice["logprobs"] = logprobs(c.logprobs, first_offset(i, c.logprobs));
    choice["finish_reason"] = reason(c);
    list.push_back(std::move(choice));
    ours.push_back(extras_of(job_, c.result));
  }
  reply["choices"] = std::move(list);
  reply["usage"] = usage_json();
  if (choices_.size() == 1) reply["timings"] = timings_of(choices_.front().result);
  reply["narrows"] = ours.size() == 1 ? ours.front() : Json{{"choices", std::move(ours)}};
  if (!job_.request.warnings.empty()) reply["warnings"] = job_.request.warnings;
  return reply;
}

Json OpenAiReplies::progress(const Event& event) const {
  const double n_new = static_cast<double>(event.n_prompt - event.n_cached);
  Json reply = head(chat() ? "chat.completion.chunk" : "text_completion");
  reply["choices"] = Json::array();
  reply["narrows"] = {{"progress",
                       {{"index", event.choice},
                        {"prompt_tokens", event.n_prompt},
                        {"cached_tokens", event.n_cached},
                        {"processed_tokens", event.n_cached + static_cast<int64_t>(event.done * n_new)},
                        {"seconds", event.seconds}}}};
  return reply;
}

/// A chunk of a choice, which has a delta or a text already.
Json OpenAiReplies::chunk(int index, Choice& c, Json choice) {
  Json reply = head(chat() ? "chat.completion.chunk" : "text_completion");
  c.begun = true;
  Json all = {{"index", index}};
  all.update(choice);
  reply["choices"] = Json::array({std::move(all)});
  return reply;
}

std::string OpenAiReplies::stream(const Event& event) {
  if (event.kind == Event::Kind::progress) return sse(progress(event));
  if (event.kind == Event::Kind::failed) return {};
  Choice& c = choice_of(event);
  const AnswerDelta delta = take(event);
  std::string out;
  if (!delta.empty() || !event.logprobs.empty()) {
    Json choice;
    if (chat()) {
      Json d = Json::object();
      if (!c.begun) d["role"] = "assistant";
      if (!delta.reasoning.empty()) d["reasoning_content"] = delta.reasoning;
      if (!delta.content.empty() || (delta.calls.empty() && delta.reasoning.empty())) {
        d["content"] = delta.content;
      } else if (!c.begun) {
        d["content"] = nullptr;
      }
      if (!delta.calls.empty()) d["tool_calls"] = call_deltas(delta);
      choice["delta"] = std::move(d);
    } else {
      const bool echo = !c.begun && job_.request.echo;
      choice["text"] = echo ? prompt_text(static_cast<size_t>(event.choice)) + delta.content : delta.content;
    }
    if (!c.begun) c.n_bytes = first_offset(static_cast<size_t>(event.choice), event.logprobs);
    choice["logprobs"] = logprobs(event.logprobs, c.n_bytes);
    choice["finish_reason"] = nullptr;
    for (const TokenLogprob& t : event.logprobs) c.n_bytes += static_cast<int64_t>(t.piece.size());
    out += sse(chunk(event.choice, c, std::move(choice)));
  }
  if (event.kind != Event::Kind::finished) return out;
  Json choice;
  if (chat()) {
    choice["delta"] = Json::object();
    if (!c.begun) choice["delta"]["role"] = "assistant";
  } else {
    const bool echo = !c.begun && job_.request.echo;
    choice["text"] = echo ? prompt_text(static_cast<size_t>(event.choice)) : "";
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = reason(c);
  Json last = chunk(event.choice, c, std::move(choice));
  last["timings"] = timings_of(c.result);
  last["narrows"] = extras_of(job_, c.result);
  if (!job_.request.warnings.empty()) last["warnings"] = job_.request.warnings;
  return out + sse(last);
}

std::string OpenAiReplies::stream_end() {
  std::string end;
  if (job_.request.include_usage) {
    Json reply = head(chat() ? "chat.completion.chunk" : "text_completion");
    reply["choices"] = Json::array();
    reply["usage"] = usage_json();
    end = sse(reply);
  }
  return end + "data: [DONE]\n\n";
}

std::unique_ptr<Replies> openai_replies(const Job& job, ReplyContext context) {
  return std::make_unique<OpenAiReplies>(job, std::move(context));
}

}  // namespace

const Dialect kOpenAiChat = {"chatcmpl", parse_chat, openai_replies, openai_error};
const Dialect kOpenAiCompletion = {"cmpl", parse_completion, openai_replies, openai_error};

}  // namespace narrows::server
