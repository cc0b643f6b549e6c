// `run --session FILE`: a cache that outlives the program.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

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

}  // namespace narrows::cli
