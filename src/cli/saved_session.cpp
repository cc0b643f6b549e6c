#include "cli/saved_session.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "base/utf8.h"
#include "cli/output.h"
#include "narrows/session_file.h"

namespace narrows::cli {

Result<ResumedSession> resume_session(const std::shared_ptr<const Model>& model,
                                      const SessionOptions& options, const std::string& path,
                                      std::span<const Token> prompt) {
  std::error_code failed;
  if (!std::filesystem::exists(path, failed)) {
    Result<std::unique_ptr<Session>> made = Session::create(model, options);
    if (!made.ok()) return made.status();
    return ResumedSession{std::move(*made), 0};
  }
  Result<SavedSession> saved = load_session(model, options, path);
  if (!saved.ok()) return saved.status();
  Session& session = *saved->session;
  if (session.profile().name != options.kv.name) {
    return Status(StatusCode::invalid_argument,
                  fmt::format("{} was saved with --kv {}: give that, or another --session", quote(path),
                              session.profile().name));
  }
  const size_t n = std::min(prompt.size(), saved->tokens.size());
  const auto same =
      std::mismatch(prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(n), saved->tokens.begin())
          .first -
      prompt.begin();
  const int64_t most = Session::segment_end(options.kv, static_cast<int64_t>(prompt.size()));
  const int64_t kept = session.kept_prefix(std::min<int64_t>(same, most));
  if (kept > 0) {
    session.keep_prefix(kept);
  } else {
    session.reset();
  }
  note(fmt::format("[{} of the prompt's {} tokens come from {}]", kept, prompt.size(), quote(path)));
  return ResumedSession{std::move(saved->session), kept};
}

SessionKeeper::SessionKeeper(Session& session, std::string path, std::vector<Token> prompt, int64_t n_cached)
    : session_(session), path_(std::move(path)), prompt_(std::move(prompt)), n_cached_(n_cached) {}

Status SessionKeeper::save(std::span<const Token> tokens) {
  if (Status s = save_session(session_, tokens, path_); !s.ok()) return s;
  note(fmt::format("[{} tokens saved in {}]", tokens.size(), quote(path_)));
  return {};
}

void SessionKeeper::prompt_is_read() {
  is_read_ = true;
  // The file has the rest already.
  if (path_.empty() || session_.kept_prefix(session_.n_past()) <= n_cached_) return;
  if (Status s = save(prompt_); !s.ok()) print_error(s);
}

Status SessionKeeper::finish(const Answer& answer) {
  if (path_.empty()) return {};
  if (!is_read_) {
    const int64_t n = session_.go_back(static_cast<int64_t>(prompt_.size()));
    return n > n_cached_ ? save(std::span(prompt_).first(static_cast<size_t>(n))) : Status();
  }
  std::vector<Token> tokens = prompt_;
  tokens.insert(tokens.end(), answer.tokens_in_cache.begin(), answer.tokens_in_cache.end());
  return save(tokens);
}

}  // namespace narrows::cli
