// Quality of a cache profile on real text: teacher-forced perplexity, KL divergence to dense attention, top-1
// agreement and attention mass kept. Every profile's cache is filled by one exact prefill and then decodes
// the same tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrows/engine.h"

namespace narrows {

struct EvalOptions {
  int64_t context = 4096;  ///< tokens of prefill
  int64_t tokens = 256;    ///< tokens decoded and judged after it
  std::vector<KvProfile> profiles;
  std::string basis_path;
  int n_threads = 0;
  /// If its attention is none of automatic and f32, or its mass below 1: the profiles' prompt attends so, and
  /// the reference's to all tokens in f32. Then the row of f16 shows what the attention costs alone.
  PromptOptions prompt;
  /// Three more rows: llama.cpp with its f16 cache, flash and plain attention, against our f16; and its plain
  /// against its flash attention, which is the noise that any two correct engines show on quantised weights.
  bool with_llama_cpp = false;
  /// A row each: llama.cpp's own caches (LlamaPeer::kv_types()), flash attention, against llama.cpp's f16, so
  /// that what differs is the cache and not the engine; f16 itself against ours. Their prompts go through
  /// their caches.
  std::vector<std::string> peer_kv;
};

struct EvalRow {
  std::string kv;                 ///< as asked for, or "llama.cpp q8_0"
  std::string reference = "f16";  ///< whose distribution kl and top1 are to: ours or "llama.cpp f16"
  double ppl = 0;                 ///< perplexity of the text's own tokens
  double kl_mean = 0;             ///< nats, of the next-token distribution to that of f16
  double kl_p99 = 0;
  double top1 = 0;             ///< share of steps whose most likely token is that of f16
  double mass_kept = 1;        ///< mean over steps, sparse layers and heads; 1 if all tokens are read
  double prompt_read = 1;      ///< Session::prompt_read()
  double mass_best = 1;        ///< the same if tokens were ranked by their exact probability
  CacheStats cache;            ///< of --peer-kv: llama.cpp's own count, all of it pages; none of --peer
  double compression() const;  ///< whole cache, exact windows and dense layers included
  double compression_layers() const;  ///< over the layers that the profile compresses
  double compression_pages() const;   ///< encoded pages alone
  /// What each further token takes over all layers: its share of pages, or f16 where a layer stays exact.
  double bytes_per_token() const;
  double bytes_per_token_f16() const;
};

/// invalid_argument if the text has fewer than context + tokens + 1 tokens (both counts).
Result<std::vector<EvalRow>> evaluate(std::shared_ptr<const Model> model, std::span<const Token> text,
                                      const EvalOptions& options, const ProgressFn& progress = {});

}  // namespace narrows
