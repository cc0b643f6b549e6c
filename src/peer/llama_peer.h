// llama.cpp in our process: the reference for dense logits and the peer that bench measures against.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrows/engine.h"
#include "narrows/status.h"
#include "narrows/text.h"

namespace narrows {

struct LlamaPeerOptions {
  int64_t n_ctx = 0;  ///< tokens its cache holds
  int n_threads = 0;
  std::string kv = "f16";       ///< how its cache is kept, see kv_types(): of keys and values, or "q8_0/q4_0"
  bool flash_attention = true;  ///< its fast path; off: plain attention with float32 accumulators
  RopeOverrides rope = {};
};

/// One llama_context. Not thread-safe.
class LlamaPeer {
 public:
  /// invalid_file: llama.cpp refuses the file; invalid_argument: the cache's name; unsupported: it runs no
  /// such model, or not with that cache (a head that is no whole number of its blocks); out_of_memory.
  static Result<std::unique_ptr<LlamaPeer>> create(const std::string& gguf_path,
                                                   const LlamaPeerOptions& options);
  /// llama.cpp's names of what its caches can hold on a CPU, largest first.
  static std::vector<std::string> kv_types();
  /// invalid_argument if it is not one of them, nor two with a stroke between (keys, values); lists them.
  static Status check_kv(const std::string& kv);
  ~LlamaPeer();
  LlamaPeer(const LlamaPeer&) = delete;
  LlamaPeer& operator=(const LlamaPeer&) = delete;

  /// Runs tokens on top of the cache, logits of the last one only.
  Status prefill(std::span<const Token> tokens);
  Status decode(Token token) { return prefill({&token, 1}); }
  std::span<const float> logits() const;  ///< [n_vocab], after the last token
  int64_t n_past() const;
  int64_t kv_bytes() const;  ///< of n_past tokens, by llama.cpp's own count of the saved state
  void clear();

 private:
  struct Impl;
  explicit LlamaPeer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace narrows
