#include "server/replies.h"

#include <algorithm>

namespace narrows::server {

namespace {

double per_second(int64_t n, double seconds) { return seconds > 0 ? static_cast<double>(n) / seconds : 0; }

/// Milliseconds of each of n.
double ms_each(double seconds, int64_t n) { return n > 0 ? seconds * 1000 / static_cast<double>(n) : 0; }

}  // namespace

std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string sse(const Json& data, const char* name) {
  const std::string head = name != nullptr ? std::string("event: ") + name + "\n" : std::string();
  return head + "data: " + dump(data) + "\n\n";
}

Json openai_error(const ApiError& error) { return Json::parse(to_json(error)); }

Json extras_of(const Job& job, const ChoiceResult& r) {
  const auto ratio = [](int64_t a, int64_t b) {
    return b > 0 ? static_cast<double>(a) / static_cast<double>(b) : 0;
  };
  const int64_t n_new = r.n_prompt - r.n_cached;
  return {{"slot", r.slot},
          {"kv", r.kv},
          {"budget", r.budget >= 0 ? Json(r.budget) : Json("all")},
          {"tokens_read", r.n_read},
          {"cache_tokens", r.cache.n_tokens},
          {"cache_bytes", r.cache.bytes},
          {"cache_bytes_f16", r.cache.bytes_f16},
          {"compression", ratio(r.cache.bytes_f16, r.cache.bytes)},
          {"cached_tokens", r.n_cached},
          {"queue_s", r.queue_s},
          {"prefill_s", r.prefill_s},
          {"prefill_tok_s", per_second(n_new, r.prefill_s)},
          {"decode_s", r.decode_s},
          {"decode_tok_s", per_second(std::max<int64_t>(0, r.n_generated - 1), r.decode_s)},
          {"seed", job.request.sampling.seed}};
}

Json timings_of(const ChoiceResult& r) {
  const int64_t n_new = r.n_prompt - r.n_cached;
  return {{"cache_n", r.n_cached},
          {"prompt_n", n_new},
          {"prompt_ms", r.prefill_s * 1000},
          {"prompt_per_token_ms", ms_each(r.prefill_s, n_new)},
          {"prompt_per_second", per_second(n_new, r.prefill_s)},
          {"predicted_n", r.n_generated},
          {"predicted_ms", r.decode_s * 1000},
          {"predicted_per_token_ms", ms_each(r.decode_s, r.n_generated)},
          {"predicted_per_second", per_second(std::max<int64_t>(0, r.n_generated - 1), r.decode_s)}};
}

}  // namespace narrows::server
