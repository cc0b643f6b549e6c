// What a run says at its end: the summary for people on stderr, the contract's JSON document for programs.
#pragma once

#include <cstdint>
#include <string>

#include "cli/generate.h"
#include "narrows/engine.h"

namespace narrows::cli {

struct RunReport {
  Answer answer;  ///< a chat: sums over its turns
  CacheStats cache;
  std::string profile;  ///< as asked for
  int64_t n_ctx = 0;
  int64_t n_ctx_train = 0;
  uint32_t seed = 0;
  bool saved = false;  ///< the session goes to a file

  double prefill_tok_s() const;
  double decode_tok_s() const;
  double compression() const;  ///< f16 bytes by bytes; 0 for an empty cache
};

RunReport make_report(const Session& session, const Answer& answer, uint32_t seed);

/// Two lines: speeds; cache, seed and reason to stop.
std::string summary(const RunReport& report);

/// Why the answer ended, with what to do where that was not the model's decision.
std::string stop_sentence(const RunReport& report);

/// {"text","prompt_tokens","generated_tokens","prefill_s","decode_s","prefill_tok_s","decode_tok_s",
///  "kv":{"profile","bytes","bytes_f16","compression"},"seed"} and a line break; with --session
/// "cached_tokens" too.
std::string json_document(const RunReport& report);

}  // namespace narrows::cli
