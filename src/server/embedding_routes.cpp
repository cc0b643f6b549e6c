// /v1/embeddings, and llama.cpp's /embedding and /embeddings: texts to vectors. Each text is a choice of a
// job that the scheduler treats as any other: a slot, its cache, a turn.
#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "server/http_impl.h"
#include "server/request_parts.h"

namespace narrows::server {

namespace {

constexpr std::chrono::milliseconds kLook{200};

/// float32 numbers, little end first, in base64.
std::string base64_of(const std::vector<float>& x) {
  constexpr std::string_view kLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<uint32_t> bytes;
  for (const float v : x) {
    const auto bits = std::bit_cast<uint32_t>(v);
    for (uint32_t shift = 0; shift < 32; shift += 8) bytes.push_back(bits >> shift & 0xFFU);
  }
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    uint32_t group = 0;
    for (size_t b = 0; b < 3; ++b) group = group << 8U | (b < n ? bytes[i + b] : 0);
    for (size_t d = 0; d < 4; ++d) out += d <= n ? kLetters[group >> (18 - 6 * d) & 63U] : '=';
  }
  return out;
}

/// Cancels the job when it is left before its end.
struct Cancels {
  Job& job;
  ~Cancels() { job.channel.cancel(); }
};

}  // namespace

void HttpServer::Impl::add_embedding_routes() {
  const auto add = [this](const char* path, EmbeddingForm form) {
    http.post(path,
              [this, form](const httplib::Request& req, httplib::Response& res) { embed(req, res, form); });
  };
  add("/v1/embeddings", EmbeddingForm::openai);
  add("/embeddings", EmbeddingForm::native);
  add("/embedding", EmbeddingForm::native);
}

std::optional<Pooling> HttpServer::Impl::pooling(ApiError& error) const {
  if (options.pooling) return options.pooling;
  const std::string& of_file = model->info().pooling;
  if (of_file.empty() || of_file == "mean") return Pooling::mean;
  if (of_file == "last") return Pooling::last;
  error =
      http_error(501, fmt::format("the model's file asks for pooling \"{}\", which this server does not do; "
                                  "start it with --pooling mean or last",
                                  of_file));
  return std::nullopt;
}

std::optional<std::vector<std::vector<Token>>> HttpServer::Impl::embedding_tokens(
    const EmbeddingRequest& request, const TokenLimits& limits, ApiError& error) const {
  const Tokenizer& tokenizer = model->tokenizer();
  std::vector<std::vector<Token>> all;
  for (const Prompt& input : request.inputs) {
    std::optional<std::vector<Token>> tokens = input.tokens;
    if (!input.is_tokens) {
      tokens = tokens_within(tokenizer, {input.text, {}}, limits, error);
      if (!tokens) return std::nullopt;
      if (const std::optional<Token> end = tokenizer.end_behind_texts(); end) tokens->push_back(*end);
    }
    if (tokens->empty()) {
      error = bad_request(fmt::format("item {} has no tokens; give some text", all.size()), "input");
      return std::nullopt;
    }
    if (const auto n = static_cast<int64_t>(tokens->size()); n > limits.n_ctx) {
      error = context_exceeded(n, limits.n_ctx);
      return std::nullopt;
    }
    all.push_back(std::move(*tokens));
  }
  return all;
}

std::optional<std::vector<std::vector<float>>> HttpServer::Impl::vectors_of(
    std::span<const std::vector<Token>> prompts, Pooling pooling, const TokenLimits& limits,
    ApiError& error) {
  const Result<KvProfile> exact = KvProfile::parse("f16");
  if (!exact.ok()) {
    error = to_api_error(exact.status());
    return std::nullopt;
  }
  const auto at_once = static_cast<size_t>(scheduler.load()->options().n_slots);
  std::vector<std::vector<float>> all(prompts.size());
  // As many at a time as there are slots: a long list does not fill the queue.
  for (size_t begin = 0; begin < prompts.size(); begin += at_once) {
    const auto some = prompts.subspan(begin, std::min(at_once, prompts.size() - begin));
    auto job = std::make_shared<Job>();
    job->id = next_id("embd");
    job->profile = *exact;
    job->embeds = pooling;
    job->request.cache_prompt = false;  // what is cached has no hidden states
    job->request.max_tokens = 0;
    job->prompts.assign(some.begin(), some.end());
    if (const std::optional<ApiError> refused = scheduler.load()->submit(job)) {
      error = *refused;
      return std::nullopt;
    }
    const Cancels at_end{*job};
    for (size_t n_open = some.size(); n_open > 0;) {
      std::optional<Event> event = job->channel.pop(kLook);
      if (!event) {
        std::optional<ApiError> end = limits.given_up();
        if (!end && took_too_long(*job))
          end = http_error(504, "the embedding took longer than this server allows");
        if (end) {
          error = *end;
          return std::nullopt;
        }
        continue;
      }
      if (event->kind == Event::Kind::failed) {
        error = event->error;
        return std::nullopt;
      }
      if (event->kind != Event::Kind::finished) continue;
      log_job(*job, event->result, "embedding");
      all[begin + static_cast<size_t>(event->choice)] = std::move(event->result.embedding);
      --n_open;
    }
  }
  return all;
}

void HttpServer::Impl::embed(const httplib::Request& req, httplib::Response& res, EmbeddingForm form) {
  ApiError error;
  const auto refuse = [&] {
    ++metrics.refused;
    reply(res, error);
  };
  if (!has_json_body(req, error)) return refuse();
  const auto request = parse_embedding(req.body, model->tokenizer().n_vocab(), model->info().n_embd, error);
  if (!request) return refuse();
  const std::optional<Pooling> how = pooling(error);
  if (!how) return refuse();
  const TokenLimits limits = token_limits(req);
  const auto prompts = embedding_tokens(*request, limits, error);
  if (!prompts) return refuse();
  const auto vectors = vectors_of(*prompts, *how, limits, error);
  if (!vectors) return reply(res, error);

  Json list = Json::array();
  int64_t n_tokens = 0;
  for (size_t i = 0; i < vectors->size(); ++i) {
    n_tokens += static_cast<int64_t>((*prompts)[i].size());
    Json vector = request->base64 ? Json(base64_of((*vectors)[i])) : Json((*vectors)[i]);
    if (form == EmbeddingForm::native) {
      list.push_back({{"index", i}, {"embedding", Json::array({std::move(vector)})}});
    } else {
      list.push_back({{"object", "embedding"}, {"index", i}, {"embedding", std::move(vector)}});
    }
  }
  if (form == EmbeddingForm::native) return reply(res, list);
  Json whole = {{"object", "list"},
                {"data", std::move(list)},
                {"model", options.model_name},
                {"usage", {{"prompt_tokens", n_tokens}, {"total_tokens", n_tokens}}}};
  if (!request->warnings.empty()) whole["warnings"] = request->warnings;
  reply(res, whole);
}

}  // namespace narrows::server
