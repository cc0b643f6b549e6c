// `run --session FILE`: a cache that outlives the program.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cli/generate.h"
#include "narrows/engine.h"

namespace narrows::cli {

struct ResumedSession {
  std::unique_ptr<Session> session;
  int64_t n_cached = 0;  ///< tokens of the prompt that its cache holds already; no others are in it
};

/// The session saved in the file as far as the prompt begins like it; an empty one if there is no such file.
/// invalid_argument if it was saved with another profile; else as load_session().
Result<ResumedSession> resume_session(const std::shared_ptr<const Model>& model,
                                      const SessionOptions& options, const std::string& path,
                                      std::span<const Token> prompt);

/// Writes the session to its file as soon as the prompt is read, and again at the end, however that comes:
/// what was read is not lost with the answer.
class SessionKeeper {
 public:
  /// The session holds the first n_cached tokens of the prompt. An empty path keeps nothing.
  SessionKeeper(Session& session, std::string path, std::vector<Token> prompt, int64_t n_cached);

  /// Saves if that spares the next run some reading. A failure is said, and the answer may still come.
  void prompt_is_read();
  /// Saves the session with the answer, or of a prompt that was not read to its end what can be gone on from.
  Status finish(const Answer& answer);

 private:
  Status save(std::span<const Token> tokens);

  Session& session_;
  std::string path_;
  std::vector<Token> prompt_;
  int64_t n_cached_;
  bool is_read_ = false;
};

}  // namespace narrows::cli
