// Everything that needs no slot: health, models, properties, metrics, tokens, templates, the chat page.
#include "server/chat_page.h"
#include "server/http_impl.h"
#include "server/replies.h"

namespace narrows::server {

namespace {

Json profile_json(const KvProfile& p) {
  return {{"name", p.name},
          {"budget", p.budget == KvProfile::kBudgetAll    ? Json("all")
                     : p.budget == KvProfile::kBudgetAuto ? Json("auto")
                                                          : Json(p.budget)},
          {"n_sink", p.n_sink},
          {"n_recent", p.n_recent}};
}

}  // namespace

void HttpServer::Impl::add_small_routes() {
  http.get("/health", [this](const httplib::Request&, httplib::Response& res) {
    if (stopping) {
      reply(res, http_error(503, "the server is shutting down"));
    } else if (ready()) {
      reply(res, {{"status", "ok"}});
    } else {
      reply(res, http_error(503, "the model is still being loaded"));
    }
  });

  const auto the_model = [this]() -> Json {
    const ModelInfo& info = model->info();
    return {{"id", options.model_name},
            {"object", "model"},
            {"created", 0},
            {"owned_by", "narrows"},
            {"meta",
             {{"architecture", info.architecture},
              {"name", info.name},
              {"n_vocab", info.n_vocab},
              {"n_ctx_train", info.n_ctx_train},
              {"n_ctx", scheduler.load()->n_ctx()},
              {"n_embd", info.n_embd},
              {"size", info.weight_bytes}}}};
  };
  const auto models = [the_model](const httplib::Request&, httplib::Response& res) {
    reply(res, {{"object", "list"}, {"data", Json::array({the_model()})}});
  };
  http.get("/v1/models", models);
  http.get("/models", models);
  http.get(R"(/v1/models/(.+))", [this, the_model](const httplib::Request& req, httplib::Response& res) {
    if (req.matches[1].str() == options.model_name) return reply(res, the_model());
    reply(res, http_error(404, "there is no such model; /v1/models names the one that is served"));
  });

  http.get("/props", [this](const httplib::Request&, httplib::Response& res) {
    const SchedulerOptions& o = scheduler.load()->options();
    reply(res, {{"model", options.model_name},
                {"fingerprint", model->info().fingerprint},
                {"n_ctx", scheduler.load()->n_ctx()},
                {"total_slots", o.n_slots},
                {"has_chat_template", model->tokenizer().has_chat_template()},
                {"can_save_sessions", !options.session_dir.empty()},
                {"kv", profile_json(o.session.kv)},
                {"kv_profiles", KvProfile::names()},
                {"cache_limit_bytes", scheduler.load()->memory_limit()},
                {"threads", o.session.n_threads}});
  });

  http.get("/metrics", [this](const httplib::Request&, httplib::Response& res) {
    res.set_content(metrics.prometheus(scheduler.load()->gauges()),
                    "text/plain; version=0.0.4; charset=utf-8");
  });

  http.post("/tokenize", [this](const httplib::Request& req, httplib::Response& res) {
    ApiError error;
    if (!has_json_body(req, error)) return reply(res, error);
    const std::optional<TokenizeRequest> r = parse_tokenize(req.body, error);
    if (!r) return reply(res, error);
    const Result<std::vector<Token>> tokens =
        model->tokenizer().encode(r->content, r->add_special, r->parse_special);
    if (!tokens.ok()) return reply(res, to_api_error(tokens.status()));
    Json list = Json::array();
    for (const Token t : *tokens) {
      if (!r->with_pieces) {
        list.push_back(t);
        continue;
      }
      const std::string piece = model->tokenizer().piece(t, true);
      Utf8Stream stream;
      list.push_back({{"id", t}, {"piece", stream.push(piece) + stream.flush()}});
    }
    reply(res, {{"tokens", std::move(list)}});
  });

  http.post("/detokenize", [this](const httplib::Request& req, httplib::Response& res) {
    ApiError error;
    if (!has_json_body(req, error)) return reply(res, error);
    const auto tokens = parse_detokenize(req.body, model->tokenizer().n_vocab(), error);
    if (!tokens) return reply(res, error);
    Utf8Stream stream;
    const std::string text = stream.push(model->tokenizer().decode(*tokens, true));
    reply(res, {{"content", text + stream.flush()}});
  });

  http.post("/apply-template", [this](const httplib::Request& req, httplib::Response& res) {
    ApiError error;
    if (!has_json_body(req, error)) return reply(res, error);
    const auto r = parse_apply_template(req.body, error);
    if (!r) return reply(res, error);
    const Result<PreparedChat> chat = prepare_chat(model->tokenizer(), r->conversation);
    if (!chat.ok()) return reply(res, to_api_error(chat.status()));
    reply(res, {{"prompt", chat->prompt.text}});
  });

  const auto page = [this](const char* path, std::string_view content, const char* type) {
    http.get(path, [content, type](const httplib::Request&, httplib::Response& res) {
      // The page needs nothing from elsewhere, and must not be made to.
      res.set_header("Content-Security-Policy",
                     "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src "
                     "'self' data:; "
                     "base-uri 'none'; form-action 'none'; frame-ancestors 'none'");
      res.set_content(std::string(content), type);
    });
  };
  page("/", chat_page::html(), "text/html; charset=utf-8");
  page("/index.html", chat_page::html(), "text/html; charset=utf-8");
  page("/chat.js", chat_page::js(), "text/javascript; charset=utf-8");
  page("/markdown.js", chat_page::markdown(), "text/javascript; charset=utf-8");
  page("/store.js", chat_page::store(), "text/javascript; charset=utf-8");
  page("/chat.css", chat_page::css(), "text/css; charset=utf-8");
}

}  // namespace narrows::server
