// What the dialects ask beside generations: the model as Ollama's clients list it, tokens counted as
// Anthropic's do.
#include "server/dialect.h"
#include "server/http_impl.h"
#include "server/replies.h"

namespace narrows::server {

namespace {

/// Of Ollama's protocol, which clients look at.
constexpr const char* kOllamaVersion = "0.12.0";

Json details_of(const ModelInfo& info) {
  return {{"parent_model", ""},          {"format", "gguf"},
          {"family", info.architecture}, {"families", Json::array({info.architecture})},
          {"parameter_size", ""},        {"quantization_level", ""}};
}

}  // namespace

void HttpServer::Impl::add_dialect_routes() {
  http.post("/v1/messages/count_tokens", [this](const httplib::Request& req, httplib::Response& res) {
    ApiError error;
    const std::shared_ptr<Job> job = make_job(req, kAnthropicCount, error);
    if (job == nullptr) return reply(res, error, kAnthropicCount.error);
    reply(res, {{"input_tokens", job->prompts.front().size()}});
  });

  const auto listed = [this]() -> Json {
    const ModelInfo& info = model->info();
    return {
        {"name", options.model_name}, {"model", options.model_name}, {"modified_at", "1970-01-01T00:00:00Z"},
        {"size", info.weight_bytes},  {"digest", info.fingerprint},  {"details", details_of(info)}};
  };
  http.get("/api/tags", [listed](const httplib::Request&, httplib::Response& res) {
    reply(res, {{"models", Json::array({listed()})}});
  });
  http.get("/api/ps", [listed](const httplib::Request&, httplib::Response& res) {
    reply(res, {{"models", Json::array({listed()})}});
  });
  http.get("/api/version", [](const httplib::Request&, httplib::Response& res) {
    reply(res, {{"version", kOllamaVersion}});
  });
  http.post("/api/show", [this](const httplib::Request& req, httplib::Response& res) {
    ApiError error;
    if (!has_json_body(req, error) || !parse_object(req.body, error))
      return reply(res, error, kOllamaChat.error);
    const ModelInfo& info = model->info();
    Json can = Json::array({"completion"});
    if (knows_tools(model->tokenizer())) can.push_back("tools");
    reply(res, {{"modelfile", ""},
                {"parameters", ""},
                {"template", ""},
                {"details", details_of(info)},
                {"model_info",
                 {{"general.architecture", info.architecture},
                  {"general.name", info.name},
                  {info.architecture + ".context_length", scheduler.load()->n_ctx()},
                  {info.architecture + ".embedding_length", info.n_embd}}},
                {"capabilities", std::move(can)}});
  });
}

}  // namespace narrows::server
