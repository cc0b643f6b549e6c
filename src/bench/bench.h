// Speed of prefill and decode at given depths, ours and llama.cpp's in one process: same file, same tokens,
// same threads, rounds interleaved so that a drift of the machine hits all engines alike; medians.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bench/machine.h"
#include "narrows/engine.h"

namespace narrows {

struct BenchOptions {
  std::vector<int64_t> contexts = {0, 4096};  ///< tokens in the cache before decoding
  std::vector<KvProfile> profiles;
  std::string basis_path;
  int n_threads = 0;
  PromptOptions prompt;
  int rounds = 5;          ///< interleaved decode rounds a depth
  int tokens = 32;         ///< tokens decoded a round
  int prefill_rounds = 1;  ///< interleaved prefills a depth; the cache of the last one is decoded on
  bool with_llama_cpp = false;
  std::vector<std::string> peer_kv = {
      "f16"};  ///< caches of llama.cpp (LlamaPeer::kv_types()); ratios are to the first
};

/// Median of some rounds, with the slowest and the fastest.
struct BenchSpeed {
  double median = 0;  ///< tokens a second; 0: not measured
  double min = 0;
  double max = 0;
  double vs_peer = 0;  ///< median over rounds of this / the peer's in the same round; 0 without peer
  double share = 0;    ///< of the machine's limit
};

/// Milliseconds a decoded token, the mean of all rounds, as the first thread sees them, waiting included.
struct StepMs {
  double products = 0;  ///< with weights, norms and activations included
  double score = 0;     ///< attention's stages
  double select = 0;
  double rebuild = 0;
  double attend = 0;
  double rest = 0;  ///< embedding, room in the cache, encoding of blocks that leave the window
  double total() const { return products + score + select + rebuild + attend + rest; }
};

struct BenchRow {
  std::string engine;  ///< "narrows" or "llama.cpp"
  std::string kv;
  int64_t context = 0;
  BenchSpeed prefill;  ///< 0 at context 0; all profiles of narrows share one prefill. share: of flops_s
  BenchSpeed decode;   ///< share: that of read_bytes_s at which the weights alone are read
  std::optional<StepMs> step;  ///< of narrows
  int64_t kv_bytes = 0;
  int64_t peak_rss_bytes = 0;  ///< of the whole process since run_bench() began, all engines together
};

struct BenchReport {
  MachineLimits machine;  ///< measured first
  int64_t weight_bytes = 0;
  std::vector<BenchRow> rows;
};

/// text must have at least max(contexts) + (rounds + 1) * tokens + 1 tokens: a round warms up; decoding
/// follows the text.
Result<BenchReport> run_bench(std::shared_ptr<const Model> model, std::span<const Token> text,
                              const BenchOptions& options,
                              const std::function<bool(const std::string& what)>& progress);

}  // namespace narrows
