// Sessions on disk: the cache as it is, so that a long prompt is read once. docs/server_api.md has the
// format.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrows/engine.h"

namespace narrows {

struct SavedSession {
  std::unique_ptr<Session> session;
  std::vector<Token> tokens;  ///< those in its cache
};

/// Writes the session with the tokens that its cache holds, aside, synced and renamed: the file is whole or
/// not there. invalid_argument if there are not as many tokens, the session is empty or in the middle of a
/// prompt, or the path cannot be written; disk_full; io_error.
Status save_session(const Session& session, std::span<const Token> tokens, const std::string& path);

/// A session that goes on to the last bit as the saved one would have. The profile and `segments` are the
/// file's, whatever the options say; n_ctx and threads are the options'. invalid_file if the file is missing,
/// cut off, damaged, none of ours, of another version or of another model; context_full if n_ctx is too small
/// for it; out_of_memory.
Result<SavedSession> load_session(std::shared_ptr<const Model> model, const SessionOptions& options,
                                  const std::string& path);

}  // namespace narrows
