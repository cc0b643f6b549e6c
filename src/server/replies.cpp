#include "server/replies.h"

#include <algorithm>

#include "base/utf8.h"

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

double per_second(int64_t n, double seconds) { return seconds > 0 ? static_cast<double>(n) / seconds : 0; }

}  // namespace

std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

Replies::Replies(const Job& job, std::string model_name)
    : job_(job),
      model_name_(std::move(model_name)),
      created_(std::chrono::duration_cast<std::chrono::seconds>(
                   std::chrono::system_clock::now().time_since_epoch())
                   .count()),
      choices_(static_cast<size_t>(job.n_choice())) {}

Json Replies::head(const char* object) const {
  return {{"id", job_.id}, {"object", object}, {"created", created_}, {"model", model_name_}};
}

Json Replies::usage() const {
  int64_t n_prompt = 0;
  int64_t n_cached = 0;
  int64_t n_generated = 0;
  for (size_t i = 0; i < choices_.size(); ++i) {
    n_generated += choices_[i].result.n_generated;
    if (i % static_cast<size_t>(job_.request.n) != 0) continue;  // further choices of the same prompt
    n_prompt += choices_[i].result.n_prompt;
    n_cached += choices_[i].result.n_cached;
  }
  return {{"prompt_tokens", n_prompt},
          {"completion_tokens", n_generated},
          {"total_tokens", n_prompt + n_generated},
          {"prompt_tokens_details", {{"cached_tokens", n_cached}}}};
}

/// What only this server has to say of a choice.
Json Replies::extras(const ChoiceResult& r) const {
  const auto ratio = [](int64_t a, int64_t b) {
    return b > 0 ? static_cast<double>(a) / static_cast<double>(b) : 0;
  };
  const int64_t n_new = r.n_prompt - r.n_cached;
  return {{"slot", r.slot},
          {"kv", r.kv},
          {"budget", r.budget >= 0 ? Json(r.budget) : Json("all")},
          {"tokens_read", r.n_read},
          {"cache_tokens", r.cache.n_tokens},
          {"cache_bytes", r.cache.bytes},
          {"cache_bytes_f16", r.cache.bytes_f16},
          {"compression", ratio(r.cache.bytes_f16, r.cache.bytes)},
          {"cached_tokens", r.n_cached},
          {"queue_s", r.queue_s},
          {"prefill_s", r.prefill_s},
          {"prefill_tok_s", per_second(n_new, r.prefill_s)},
          {"decode_s", r.decode_s},
          {"decode_tok_s", per_second(std::max<int64_t>(0, r.n_generated - 1), r.decode_s)},
          {"seed", job_.request.sampling.seed}};
}

Json Replies::logprobs(const std::vector<TokenLogprob>& tokens, size_t offset) const {
  if (!job_.request.logprobs) return nullptr;
  if (job_.request.chat) {
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
    values.push_back(t.logprob);
    Json top = Json::object();
    for (const auto& a : t.top) top[as_text(a.piece)] = a.logprob;
    tops.push_back(std::move(top));
    offsets.push_back(offset);
    offset += t.piece.size();
  }
  return {{"tokens", std::move(names)},
          {"token_logprobs", std::move(values)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

void Replies::add(const Event& event) {
  Choice& c = choices_[static_cast<size_t>(event.choice)];
  if (event.kind == Event::Kind::text) {
    c.text += event.text;
    c.logprobs.insert(c.logprobs.end(), event.logprobs.begin(), event.logprobs.end());
  } else if (event.kind == Event::Kind::finished) {
    c.result = event.result;
    c.finished = true;
  }
}

Json Replies::whole() const {
  Json reply = head(job_.request.chat ? "chat.completion" : "text_completion");
  Json list = Json::array();
  Json ours = Json::array();
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& c = choices_[i];
    Json choice = {{"index", i}};
    if (job_.request.chat) {
      choice["message"] = {{"role", "assistant"}, {"content", c.text}};
    } else {
      const Prompt& prompt = job_.request.prompts[i / static_cast<size_t>(job_.request.n)];
      choice["text"] = job_.request.echo ? prompt.text + c.text : c.text;
    }
    choice["logprobs"] = logprobs(c.logprobs, 0);
    choice["finish_reason"] = c.result.finish_reason;
    list.push_back(std::move(choice));
    ours.push_back(extras(c.result));
  }
  reply["choices"] = std::move(list);
  reply["usage"] = usage();
  reply["narrows"] = ours.size() == 1 ? ours.front() : Json{{"choices", std::move(ours)}};
  return reply;
}

Json Replies::chunk(const Event& event) {
  Choice& c = choices_[static_cast<size_t>(event.choice)];
  Json reply = head(job_.request.chat ? "chat.completion.chunk" : "text_completion");
  Json choice = {{"index", event.choice}};
  if (event.kind == Event::Kind::progress) {
    const double n_new = static_cast<double>(event.n_prompt - event.n_cached);
    reply["choices"] = Json::array();
    reply["narrows"] = {{"progress",
                         {{"index", event.choice},
                          {"prompt_tokens", event.n_prompt},
                          {"cached_tokens", event.n_cached},
                          {"processed_tokens", event.n_cached + static_cast<int64_t>(event.done * n_new)},
                          {"seconds", event.seconds}}}};
    return reply;
  }
  if (event.kind != Event::Kind::text && event.kind != Event::Kind::finished) return nullptr;
  const bool last = event.kind == Event::Kind::finished;
  if (last) add(event);
  std::string text = event.text;
  if (!c.begun && job_.request.echo)
    text = job_.request.prompts[static_cast<size_t>(event.choice / job_.request.n)].text + text;
  if (job_.request.chat) {
    Json delta = Json::object();
    if (!c.begun) delta["role"] = "assistant";
    if (!last) delta["content"] = text;
    choice["delta"] = std::move(delta);
  } else {
    choice["text"] = text;
  }
  c.begun = true;
  choice["logprobs"] = last ? Json() : logprobs(event.logprobs, c.n_bytes);
  for (const TokenLogprob& t : event.logprobs) c.n_bytes += t.piece.size();
  choice["finish_reason"] = last ? Json(event.result.finish_reason) : Json();
  reply["choices"] = Json::array({std::move(choice)});
  if (last) reply["narrows"] = extras(event.result);
  return reply;
}

Json Replies::usage_chunk() const {
  Json reply = head(job_.request.chat ? "chat.completion.chunk" : "text_completion");
  reply["choices"] = Json::array();
  reply["usage"] = usage();
  return reply;
}

}  // namespace narrows::server
