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

}  // namespace narrows::cli
