// llama.cpp's own dialect: /completion and /infill.
#include "base/utf8.h"
#include "server/dialect.h"
#include "server/replies.h"
#include "server/request_parts.h"

namespace narrows::server {

namespace {

constexpr size_t kAnyLength = std::string::npos;  ///< the body has its own limit

std::optional<GenerationRequest> parse_native(std::string_view body, const RequestDefaults& defaults,
                                              ApiError& error) {
  std::optional<GenerationRequest> r = parse_completion(body, defaults, error);
  if (r && r->echo) {
    error = bad_request("echo is not supported here; /v1/completions has it", "echo");
    return std::nullopt;
  }
  return r;
}

std::optional<GenerationRequest> parse_infill(std::string_view body, const RequestDefaults& defaults,
                                              ApiError& error) {
  return read_body<GenerationRequest>(body, error, [&](Fields& f, GenerationRequest& r) {
    Infill gap;
    const auto before = f.text("input_prefix", kAnyLength);
    const auto behind = f.text("input_suffix", kAnyLength);
    if (!before) f.fail("input_prefix", "is missing");
    if (!behind) f.fail("input_suffix", "is missing");
    gap.before = before.value_or("");
    gap.behind = behind.value_or("");
    gap.begun = f.text("prompt", kAnyLength).value_or("");
    r.infill = std::move(gap);
    read_common(f, defaults, r);
    if (const auto n = f.integer("n_probs", 0, kMaxTopLogprobs); n && *n > 0)
      r.logprobs = static_cast<int>(*n);
  });
}

class NativeReplies : public Replies {
 public:
  using Replies::Replies;

  Json whole() override {
    Json all = Json::array();
    for (size_t i = 0; i < choices_.size(); ++i) {
      const Choice& c = choices_[i];
      Json one = ended(i, c, c.answer.message().content);
      if (job_.request.logprobs) one["completion_probabilities"] = probabilities(c.logprobs);
      all.push_back(std::move(one));
    }
    return all.size() == 1 ? all.front() : all;
  }
  std::string stream(const Event& event) override {
    if (event.kind == Event::Kind::failed || event.kind == Event::Kind::progress) return {};
    Choice& c = choice_of(event);
    const AnswerDelta delta = take(event);
    const auto i = static_cast<size_t>(event.choice);
    if (event.kind == Event::Kind::finished) return sse(ended(i, c, delta.content));
    Json piece = {{"index", i}, {"content", delta.content}, {"tokens", Json::array()}, {"stop", false}};
    if (job_.request.logprobs) piece["completion_probabilities"] = probabilities(event.logprobs);
    return sse(piece);
  }
  std::string stream_end() override { return {}; }
  std::string stream_error(const ApiError& error) override { return sse(openai_error(error)); }

 private:
  static Json probability(const std::string& piece, double logprob) {
    Utf8Stream text;
    const std::string token = text.push(piece) + text.flush();
    Json bytes = Json::array();
    for (const char c : piece) bytes.push_back(static_cast<unsigned char>(c));
    return {{"token", token}, {"bytes", std::move(bytes)}, {"logprob", logprob}};
  }
  static Json probabilities(const std::vector<TokenLogprob>& tokens) {
    Json all = Json::array();
    for (const TokenLogprob& t : tokens) {
      Json one = probability(t.piece, t.logprob);
      Json top = Json::array();
      for (const auto& a : t.top) top.push_back(probability(a.piece, a.logprob));
      one["top_logprobs"] = std::move(top);
      all.push_back(std::move(one));
    }
    return all;
  }
  Json ended(size_t i, const Choice& c, const std::string& content) const {
    const ChoiceResult& r = c.result;
    const bool limit = std::string_view(r.finish_reason) == "length";
    Json reply = {{"index", i},
                  {"content", content},
                  {"tokens", Json::array()},
                  {"id_slot", r.slot},
                  {"stop", true},
                  {"model", context_.model_name},
                  {"tokens_predicted", r.n_generated},
                  {"tokens_evaluated", r.n_prompt},
                  {"truncated", false},
                  {"stop_type", limit            ? "limit"
                                : r.stop.empty() ? "eos"
                                                 : "word"},
                  {"stopping_word", r.stop},
                  {"tokens_cached", r.cache.n_tokens},
                  {"timings", timings_of(r)},
                  {"narrows", extras_of(job_, r)}};
    if (!job_.request.warnings.empty()) reply["warnings"] = job_.request.warnings;
    return reply;
  }
};

std::unique_ptr<Replies> native_replies(const Job& job, ReplyContext context) {
  return std::make_unique<NativeReplies>(job, std::move(context));
}

}  // namespace

const Dialect kNative = {"cmpl", parse_native, native_replies, openai_error};
const Dialect kInfill = {"infill", parse_infill, native_replies, openai_error};

}  // namespace narrows::server
