// /slots: what they do, and their sessions to and from files of the session folder.
#include <charconv>
#include <filesystem>

#include "narrows/session_file.h"
#include "server/http_impl.h"
#include "server/replies.h"

namespace narrows::server {

namespace {

const char* name_of(SlotState state) {
  switch (state) {
    case SlotState::idle:
      return "idle";
    case SlotState::held:
      return "saving or restoring";
    case SlotState::reading:
      return "reading";
    case SlotState::writing:
      return "writing";
  }
  return "";
}

Json slot_json(const SlotInfo& s) {
  return {{"id", s.id},
          {"state", name_of(s.state)},
          {"is_processing", s.state == SlotState::reading || s.state == SlotState::writing},
          {"request", s.job_id},
          {"n_ctx", s.n_ctx},
          {"kv", s.kv},
          {"cache_tokens", s.n_tokens},
          {"prompt_tokens", s.n_prompt},
          {"generated_tokens", s.n_generated},
          {"prefill_done", s.prefill_done},
          {"cache_bytes", s.cache.bytes},
          {"cache_bytes_f16", s.cache.bytes_f16}};
}

/// Gives the slot back whatever happens.
class HeldSlot {
 public:
  HeldSlot(Scheduler& scheduler, int id, Held held)
      : scheduler_(scheduler), id_(id), held_(std::move(held)) {}
  ~HeldSlot() { scheduler_.release(id_, std::move(held_)); }
  HeldSlot(const HeldSlot&) = delete;
  HeldSlot& operator=(const HeldSlot&) = delete;
  Held& operator*() { return held_; }

 private:
  Scheduler& scheduler_;
  int id_;
  Held held_;
};

/// The file that the body names, in the session folder.
std::optional<std::string> session_path(const httplib::Request& req, const std::string& folder,
                                        ApiError& error) {
  if (folder.empty()) {
    error = http_error(501, "sessions cannot be saved: start the server with --session-dir FOLDER");
    return std::nullopt;
  }
  if (!has_json_body(req, error)) return std::nullopt;
  const std::optional<std::string> name = parse_file_name(req.body, error);
  if (!name) return std::nullopt;
  if (Status s = check_session_name(*name); !s.ok()) {
    error = bad_request(s.message(), "filename");
    return std::nullopt;
  }
  return folder + "/" + *name;
}

int64_t size_of(const std::string& path) {
  std::error_code failed;
  const auto n = std::filesystem::file_size(path, failed);
  return failed ? 0 : static_cast<int64_t>(n);
}

Json save(Held& held, const std::string& path, ApiError& error) {
  if (held.session == nullptr || held.tokens.empty()) {
    error = bad_request("the slot holds no session yet");
    return nullptr;
  }
  const auto begin = Clock::now();
  if (Status s = save_session(*held.session, held.tokens, path); !s.ok()) {
    error = to_api_error(s);
    return nullptr;
  }
  const CacheStats stats = held.session->cache_stats();
  return {{"n_saved", held.tokens.size()},
          {"n_written", size_of(path)},
          {"cache_bytes_f16", stats.bytes_f16},
          {"timings", {{"save_ms", seconds_since(begin) * 1e3}}}};
}

/// The session of a file into a slot that is held. Memory is set aside first: the file is about as large.
Json restore(Scheduler& scheduler, int id, Held& held, const std::string& path,
             std::shared_ptr<const Model> model, ApiError& error) {
  const auto begin = Clock::now();
  const auto refused = [&](int64_t bytes) {
    const std::optional<ApiError> why = scheduler.reserve(id, bytes);
    if (why) error = *why;
    return why.has_value();
  };
  const int64_t n_old = held.session != nullptr ? held.session->cache_stats().bytes : 0;
  const int64_t n_file = size_of(path);
  if (n_file > 0 && refused(n_file)) return nullptr;
  if (n_old > 0 && refused(n_old + n_file)) held = {};  // not both at a time: the earlier one goes first
  Result<SavedSession> saved = load_session(std::move(model), scheduler.options().session, path);
  if (!saved.ok()) {
    error = to_api_error(saved.status());
    return nullptr;
  }
  if (refused(saved->session->cache_stats().bytes)) return nullptr;
  held.session = std::move(saved->session);
  held.tokens = std::move(saved->tokens);
  const CacheStats stats = held.session->cache_stats();
  return {{"n_restored", held.tokens.size()},   {"n_read", size_of(path)},
          {"kv", held.session->profile().name}, {"cache_bytes", stats.bytes},
          {"cache_bytes_f16", stats.bytes_f16}, {"timings", {{"restore_ms", seconds_since(begin) * 1e3}}}};
}

}  // namespace

void HttpServer::Impl::add_slot_routes() {
  http.get("/slots", [this](const httplib::Request&, httplib::Response& res) {
    Json list = Json::array();
    for (const SlotInfo& slot : scheduler.load()->slots()) list.push_back(slot_json(slot));
    reply(res, list);
  });

  http.get("/sessions", [this](const httplib::Request&, httplib::Response& res) {
    Json list = Json::array();
    std::error_code failed;
    if (!options.session_dir.empty()) {
      for (const auto& entry : std::filesystem::directory_iterator(options.session_dir, failed)) {
        const std::string name = entry.path().filename().string();
        if (!check_session_name(name).ok() || !entry.is_regular_file(failed)) continue;
        list.push_back({{"filename", name}, {"bytes", size_of(entry.path().string())}});
      }
    }
    reply(res, {{"data", std::move(list)}});
  });

  http.post(R"(/slots/(\d{1,6}))", [this](const httplib::Request& req, httplib::Response& res) {
    const std::string digits = req.matches[1].str();
    int id = -1;
    (void)std::from_chars(digits.data(), digits.data() + digits.size(), id);
    const std::string action = req.get_param_value("action");
    ApiError error;
    std::optional<std::string> path;
    if (action == "save" || action == "restore") {
      path = session_path(req, options.session_dir, error);
      if (!path) return reply(res, error);
    } else if (action != "erase") {
      return reply(res, bad_request("action must be save, restore or erase", "action"));
    }
    Scheduler& s = *scheduler.load();
    std::optional<Held> taken = s.hold(id, error);
    if (!taken) return reply(res, error);
    Json answer;
    {
      HeldSlot slot(s, id, std::move(*taken));
      if (action == "save") {
        answer = save(*slot, *path, error);
      } else if (action == "restore") {
        answer = restore(s, id, *slot, *path, model, error);
      } else {
        answer = {{"n_erased", (*slot).tokens.size()}};
        (*slot).tokens.clear();
        if ((*slot).session != nullptr) (*slot).session->reset();
      }
    }
    if (answer.is_null()) return reply(res, error);
    answer["id_slot"] = id;
    if (path) answer["filename"] = path->substr(options.session_dir.size() + 1);
    reply(res, answer);
  });
}

}  // namespace narrows::server
