#include "server/metrics.h"

#include <fmt/format.h>

#include "base/memory.h"
#include "narrows/engine.h"

namespace narrows::server {

std::string Metrics::prometheus(const Gauges& now) const {
  std::string out;
  const auto add = [&out](const char* name, const char* type, const char* help, auto value) {
    out += fmt::format("# HELP narrows_{0} {1}\n# TYPE narrows_{0} {2}\nnarrows_{0} {3}\n", name, help, type,
                       value);
  };
  const auto count = [&](const char* name, const char* help, const std::atomic<uint64_t>& value) {
    add(name, "counter", help, value.load());
  };
  const auto seconds = [&](const char* name, const char* help, const std::atomic<uint64_t>& us) {
    add(name, "counter", help, static_cast<double>(us.load()) * 1e-6);
  };
  count("requests_total", "Generations taken", requests);
  count("requests_refused_total", "Generations refused", refused);
  count("requests_cancelled_total", "Generations whose client went away", cancelled);
  count("requests_failed_total", "Generations that failed on the way", failed);
  count("prompt_tokens_total", "Tokens of prompts", prompt_tokens);
  count("prompt_tokens_cached_total", "Tokens of prompts that were in a cache", cached_tokens);
  count("generated_tokens_total", "Tokens generated", generated_tokens);
  count("decode_steps_total", "Steps, of all slots together", decode_steps);
  seconds("prefill_seconds_total", "Time of reading prompts", prefill_us);
  seconds("decode_seconds_total", "Time of steps", decode_us);
  add("slots", "gauge", "Slots", now.n_slots);
  add("slots_busy", "gauge", "Slots at work", now.n_busy);
  add("requests_waiting", "gauge", "Choices that wait for a slot", now.n_waiting);
  add("cache_bytes", "gauge", "Bytes of all caches", now.cache_bytes);
  add("cache_f16_bytes", "gauge", "Bytes of the same tokens in half precision", now.cache_bytes_f16);
  add("cache_limit_bytes", "gauge", "Most bytes for caches", now.memory_limit);
  add("store_bytes", "gauge", "Bytes of kept prefixes", now.store_bytes);
  add("store_entries", "gauge", "Kept prefixes", now.n_stored);
  const MemoryStats memory = memory_stats();
  add("memory_weights_bytes", "gauge", "Bytes promised to weights", memory.weights);
  add("memory_caches_bytes", "gauge", "Bytes promised to caches, shared pages once", memory.caches);
  add("memory_scratch_bytes", "gauge", "Bytes promised to what steps work in", memory.scratch);
  add("memory_prompts_bytes", "gauge", "Bytes promised to what prompts work in", memory.prompts);
  add("memory_files_bytes", "gauge", "Bytes promised to session files that are read", memory.files);
  add("memory_free_bytes", "gauge", "Bytes that may still be promised", memory.free);
  add("resident_bytes", "gauge", "Resident set of the process", resident_bytes());
  return out;
}

}  // namespace narrows::server
