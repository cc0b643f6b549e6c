// Counters of the server, in Prometheus' text form at /metrics.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace narrows::server {

/// What the scheduler says of itself at one moment.
struct Gauges {
  int64_t n_slots = 0;
  int64_t n_busy = 0;
  int64_t n_waiting = 0;
  int64_t cache_bytes = 0;      ///< slots and prefix store
  int64_t cache_bytes_f16 = 0;  ///< what the same tokens would take
  int64_t store_bytes = 0;
  int64_t n_stored = 0;
  int64_t memory_limit = 0;  ///< most bytes for caches
};

struct Metrics {
  std::atomic<uint64_t> requests{0};       ///< generations that were taken
  std::atomic<uint64_t> refused{0};        ///< those that were not
  std::atomic<uint64_t> cancelled{0};      ///< the client went away
  std::atomic<uint64_t> failed{0};         ///< on the way
  std::atomic<uint64_t> prompt_tokens{0};  ///< of prompts, cached ones too
  std::atomic<uint64_t> cached_tokens{0};  ///< of them not computed
  std::atomic<uint64_t> generated_tokens{0};
  std::atomic<uint64_t> prefill_us{0};  ///< the engine's own time
  std::atomic<uint64_t> decode_us{0};
  std::atomic<uint64_t> decode_steps{0};

  std::string prometheus(const Gauges& now) const;
};

}  // namespace narrows::server
