// Speed of prefill and decode at given depths, ours and llama.cpp's in one process: same file, same tokens,
// same threads, decode rounds interleaved so that a drift of the machine hits all engines alike; medians.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrows/engine.h"

namespace narrows {

struct BenchOptions {
  std::vector<int64_t> contexts = {0, 4096};  ///< tokens in the cache before decoding
  std::vector<KvProfile> profiles;
  std::string basis_path;
  int n_threads = 0;
  PrefillProducts products = PrefillProducts::automatic;
  PrefillAttention attention = PrefillAttention::automatic;
  int rounds = 5;   ///< interleaved decode rounds a depth
  int tokens = 32;  ///< tokens decoded a round
  bool with_llama_cpp = false;
};

struct BenchRow {
  std::string engine;  ///< "narrows" or "llama.cpp"
  std::string kv;
  int64_t context = 0;
  double prefill_tok_s = 0;     ///< 0 at context 0; all profiles of narrows share one prefill
  double decode_tok_s = 0;      ///< median of the rounds
  double decode_tok_s_min = 0;  ///< slowest and fastest round
  double decode_tok_s_max = 0;
  double decode_vs_peer =
      0;  ///< median over rounds of our rate / llama.cpp's in the same round; 0 without peer
  int64_t kv_bytes = 0;
  int64_t peak_rss_bytes = 0;  ///< of the whole process so far, all engines together
};

/// text must have at least max(contexts) + (rounds + 1) * tokens + 1 tokens: a round warms up; decoding
/// follows the text.
Result<std::vector<BenchRow>> run_bench(std::shared_ptr<const Model> model, std::span<const Token> text,
                                        const BenchOptions& options,
                                        const std::function<bool(const std::string& what)>& progress);

}  // namespace narrows
