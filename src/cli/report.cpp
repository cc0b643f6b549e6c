// Formats of the summary and of the JSON document.
#include "cli/report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "cli/output.h"

namespace narrows::cli {
namespace {

double rate(int64_t count, double seconds) { return seconds > 0 ? static_cast<double>(count) / seconds : 0; }

}  // namespace

double RunReport::prefill_tok_s() const {
  return rate(answer.prompt_tokens - answer.cached_tokens, answer.prefill_s);
}
double RunReport::decode_tok_s() const { return rate(answer.decode_steps, answer.decode_s); }
double RunReport::compression() const {
  return cache.bytes > 0 ? static_cast<double>(cache.bytes_f16) / static_cast<double>(cache.bytes) : 0;
}

RunReport make_report(const Session& session, const Answer& answer, uint32_t seed) {
  return {.answer = answer,
          .cache = session.cache_stats(),
          .profile = session.profile().name,
          .n_ctx = session.n_ctx(),
          .n_ctx_train = session.model().info().n_ctx_train,
          .seed = seed};
}

std::string stop_sentence(const RunReport& report) {
  switch (report.answer.stop) {
    case StopReason::end_of_text:
      return "the model ended its answer";
    case StopReason::token_limit:
      return fmt::format("stopped at -n: {} tokens", report.answer.generated_tokens);
    case StopReason::interrupted:
      return "stopped by Ctrl-C";
    case StopReason::told_to_end:
      return "stopped by a signal";
    case StopReason::context_full:
      break;
  }
  return fmt::format("CONTEXT FULL, the answer is cut off: the cache holds all of its {} tokens; {}",
                     report.n_ctx,
                     report.n_ctx < report.n_ctx_train
                         ? fmt::format("give more with --ctx (the model was made for {})", report.n_ctx_train)
                         : "the model was made for no more, so give it a shorter prompt");
}

std::string summary(const RunReport& report) {
  const Answer& a = report.answer;
  return fmt::format(
      "[prompt {} tokens{} in {:.2f} s, {:.1f} tok/s | generated {} tokens in {:.2f} s, {:.1f} tok/s]\n"
      "[cache {}: {} for {} tokens, f16 takes {}, ratio {:.2f} | seed {} | {}]",
      a.prompt_tokens, a.cached_tokens > 0 ? fmt::format(", {} of them cached,", a.cached_tokens) : "",
      a.prefill_s, report.prefill_tok_s(), a.generated_tokens, a.decode_s, report.decode_tok_s(),
      report.profile, human_bytes(report.cache.bytes), report.cache.n_tokens,
      human_bytes(report.cache.bytes_f16), report.compression(), report.seed, stop_sentence(report));
}

std::string json_document(const RunReport& report) {
  const Answer& a = report.answer;
  nlohmann::ordered_json document = {
      {"text", a.text},
      {"prompt_tokens", a.prompt_tokens},
      {"generated_tokens", a.generated_tokens},
      {"prefill_s", a.prefill_s},
      {"decode_s", a.decode_s},
      {"prefill_tok_s", report.prefill_tok_s()},
      {"decode_tok_s", report.decode_tok_s()},
      {"kv",
       {{"profile", report.profile},
        {"bytes", report.cache.bytes},
        {"bytes_f16", report.cache.bytes_f16},
        {"compression", report.compression()}}},
      {"seed", report.seed},
  };
  if (report.saved) document["cached_tokens"] = a.cached_tokens;
  // The text is UTF-8 (Utf8Stream); "replace" keeps dump() from throwing over the profile's name.
  return document.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace narrows::cli
