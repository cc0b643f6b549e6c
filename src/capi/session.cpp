// Sessions of the C API: prompts, steps, files.
#include <fmt/format.h>

#include "base/utf8.h"
#include "capi/call.h"
#include "capi/handles.h"
#include "narrows/session_file.h"

using namespace narrows;
using capi::call;
using capi::given;
using capi::text_or;

namespace {

constexpr size_t kFirstOptions = 64, kFirstStats = 80, kFirstMemory = 64;
static_assert(sizeof(void*) != 8 ||
              (sizeof(narrows_session_options) >= kFirstOptions &&
               sizeof(narrows_cache_stats) >= kFirstStats && sizeof(narrows_memory_stats) >= kFirstMemory));

constexpr narrows_session_options default_options() {
  narrows_session_options o{};
  o.struct_size = sizeof o;
  return o;
}

Result<PrefillProducts> parse_products(const std::string& name) {
  if (name == "auto") return PrefillProducts::automatic;
  if (name == "int8") return PrefillProducts::int8;
  if (name == "bf16") return PrefillProducts::bf16;
  return {StatusCode::invalid_argument,
          fmt::format("there are no products {}; take auto, int8 or bf16", quote(name))};
}

Result<SessionOptions> read_options(const narrows_session_options* given_options) {
  narrows_session_options c = default_options();
  if (Status s = capi::read_struct(given_options, kFirstOptions, "narrows_session_options", &c); !s.ok())
    return s;
  SessionOptions o;
  Result<KvProfile> kv = KvProfile::parse(text_or(c.kv, kDefaultProfile));
  if (!kv.ok()) return kv.status();
  const Result<PrefillProducts> products = parse_products(text_or(c.products, "auto"));
  if (!products.ok()) return products.status();
  const Result<PrefillAttention> attention = parse_attention(text_or(c.attention, "auto"));
  if (!attention.ok()) return attention.status();
  const Result<double> mass = parse_prefill(text_or(c.prefill, "dense"));
  if (!mass.ok()) return mass.status();
  o.kv = std::move(*kv);
  o.basis_path = text_or(c.basis_path, "");
  o.n_ctx = c.n_ctx;
  o.n_threads = c.n_threads;
  o.prompt = {*products, *attention, *mass};
  o.segments = c.segments != 0;
  return o;
}

Status given_tokens(const narrows_session* session, const narrows_token* tokens, size_t n) {
  if (Status s = given({{session, "session"}}); !s.ok()) return s;
  return given(tokens, n, "tokens");
}

}  // namespace

extern "C" {

void narrows_session_options_init_size(narrows_session_options* options, size_t struct_size) {
  capi::init_struct(options, struct_size, default_options());
}

narrows_status narrows_session_create(const narrows_model* model, const narrows_session_options* options,
                                      narrows_session** session) {
  if (session != nullptr) *session = nullptr;
  return call("making a session", [&]() -> Status {
    if (Status s = given({{model, "model"}, {session, "session"}}); !s.ok()) return s;
    const Result<SessionOptions> o = read_options(options);
    if (!o.ok()) return o.status();
    Result<std::unique_ptr<Session>> made = Session::create(model->model, *o);
    if (!made.ok()) return made.status();
    *session = new narrows_session{std::move(*made), {}};
    return {};
  });
}

void narrows_session_free(narrows_session* session) { delete session; }

narrows_status narrows_session_prefill(narrows_session* session, const narrows_token* tokens, size_t n_tokens,
                                       narrows_progress progress, void* user) {
  return call("a prompt", [&]() -> Status {
    if (Status s = given_tokens(session, tokens, n_tokens); !s.ok()) return s;
    ProgressFn report;
    if (progress != nullptr) report = [=](double done) { return progress(done, user) != 0; };
    return session->session->prefill({tokens, n_tokens}, report);
  });
}

narrows_status narrows_session_begin_prefill(narrows_session* session, const narrows_token* tokens,
                                             size_t n_tokens) {
  return call("a prompt", [&]() -> Status {
    if (Status s = given_tokens(session, tokens, n_tokens); !s.ok()) return s;
    return session->session->begin_prefill({tokens, n_tokens});
  });
}

narrows_status narrows_session_prefill_step(narrows_session* session) {
  return call("a part of a prompt", [&]() -> Status {
    if (Status s = given({{session, "session"}}); !s.ok()) return s;
    return session->session->prefill_step();
  });
}

double narrows_session_prefill_done(const narrows_session* session) {
  return session != nullptr ? session->session->prefill_done() : -1;
}

double narrows_session_prompt_read(const narrows_session* session) {
  return session != nullptr ? session->session->prompt_read() : -1;
}

narrows_status narrows_session_decode(narrows_session* session, narrows_token token) {
  return call("a step", [&]() -> Status {
    if (Status s = given({{session, "session"}}); !s.ok()) return s;
    return session->session->decode(token);
  });
}

const float* narrows_session_logits(const narrows_session* session, size_t* n) {
  const std::span<const float> logits =
      session != nullptr ? session->session->logits() : std::span<const float>();
  if (n != nullptr) *n = logits.size();
  return logits.data();
}

int64_t narrows_session_n_past(const narrows_session* session) {
  return session != nullptr ? session->session->n_past() : -1;
}

int64_t narrows_session_n_ctx(const narrows_session* session) {
  return session != nullptr ? session->session->n_ctx() : -1;
}

int64_t narrows_session_n_threads(const narrows_session* session) {
  return session != nullptr ? session->session->n_threads() : -1;
}

narrows_status narrows_session_reset(narrows_session* session) {
  return call("forgetting tokens", [&]() -> Status {
    if (Status s = given({{session, "session"}}); !s.ok()) return s;
    session->session->reset();
    return {};
  });
}

narrows_status narrows_session_go_back(narrows_session* session, int64_t n, int64_t* n_left) {
  return call("forgetting tokens", [&]() -> Status {
    if (Status s = given({{session, "session"}}); !s.ok()) return s;
    const int64_t left = session->session->go_back(n);
    if (n_left != nullptr) *n_left = left;
    return {};
  });
}

int64_t narrows_session_kept_prefix(const narrows_session* session, int64_t n) {
  return session != nullptr ? session->session->kept_prefix(n) : -1;
}

narrows_status narrows_session_share_prefix(narrows_session* session, const narrows_session* from,
                                            int64_t n) {
  return call("sharing a beginning", [&]() -> Status {
    if (Status s = given({{session, "session"}, {from, "from"}}); !s.ok()) return s;
    return session->session->share_prefix(*from->session, n);
  });
}

narrows_status narrows_session_get_cache_stats(const narrows_session* session, narrows_cache_stats* stats) {
  return call("a cache's size", [&]() -> Status {
    if (Status s = given({{session, "session"}, {stats, "stats"}}); !s.ok()) return s;
    const CacheStats c = session->session->cache_stats();
    narrows_cache_stats out{};
    out.n_tokens = c.n_tokens;
    out.bytes = c.bytes;
    out.bytes_f16 = c.bytes_f16;
    out.bytes_compressed_layers = c.bytes_compressed_layers;
    out.bytes_f16_compressed_layers = c.bytes_f16_compressed_layers;
    out.bytes_pages = c.bytes_pages;
    out.bytes_f16_pages = c.bytes_f16_pages;
    out.bytes_hot = c.bytes_hot;
    out.n_layer_compressed = c.n_layer_compressed;
    return capi::write_struct(out, kFirstStats, "narrows_cache_stats", stats);
  });
}

narrows_status narrows_memory_get_stats(narrows_memory_stats* stats) {
  return call("the memory's size", [&]() -> Status {
    if (Status s = given({{stats, "stats"}}); !s.ok()) return s;
    const MemoryStats m = memory_stats();
    narrows_memory_stats out{};
    out.weights = m.weights;
    out.caches = m.caches;
    out.scratch = m.scratch;
    out.prompts = m.prompts;
    out.files = m.files;
    out.limit = m.limit;
    out.free = m.free;
    return capi::write_struct(out, kFirstMemory, "narrows_memory_stats", stats);
  });
}

narrows_status narrows_memory_set_limit(int64_t bytes) {
  return call("a limit of memory", [&]() -> Status {
    if (bytes < 0)
      return {StatusCode::invalid_argument, fmt::format("a limit of {} bytes of memory is below 0", bytes)};
    set_memory_limit(bytes);
    return {};
  });
}

narrows_status narrows_session_save(const narrows_session* session, const narrows_token* tokens,
                                    size_t n_tokens, const char* path) {
  return call("saving a session", [&]() -> Status {
    if (Status s = given_tokens(session, tokens, n_tokens); !s.ok()) return s;
    if (Status s = given({{path, "path"}}); !s.ok()) return s;
    return save_session(*session->session, {tokens, n_tokens}, path);
  });
}

narrows_status narrows_session_load(const narrows_model* model, const narrows_session_options* options,
                                    const char* path, narrows_session** session) {
  if (session != nullptr) *session = nullptr;
  return call("loading a session", [&]() -> Status {
    if (Status s = given({{model, "model"}, {path, "path"}, {session, "session"}}); !s.ok()) return s;
    const Result<SessionOptions> o = read_options(options);
    if (!o.ok()) return o.status();
    Result<SavedSession> saved = load_session(model->model, *o, path);
    if (!saved.ok()) return saved.status();
    *session = new narrows_session{std::move(saved->session), std::move(saved->tokens)};
    return {};
  });
}

narrows_status narrows_session_saved_tokens(const narrows_session* session, narrows_token* tokens,
                                            size_t capacity, size_t* n_tokens) {
  const narrows_status status = call("a session's tokens", [&]() -> Status {
    return given({{session, "session"}});
  });
  if (status != NARROWS_OK) return status;
  return capi::give<narrows_token>(session->saved, tokens, capacity, n_tokens);
}
}
