// A line a profile, a column a part of the written text.
#include "cli/eval_long_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/output.h"
#include "cli/progress.h"

namespace narrows::cli {

std::string long_text_table(const LongText& result) {
  size_t width = 16;
  for (const LongTextRow& r : result.rows) width = std::max(width, r.kv.size() + 2);
  std::string out = fmt::format("{:<{}}{:>9}{:>8}", "kv", width, "kl mean", "top-1");
  for (const LongTextBucket& b : result.rows.front().buckets)
    out += fmt::format("{:>9}", fmt::format("to {}", b.to));
  out += "  last half / first (95 %)\n";
  for (const LongTextRow& r : result.rows) {
    out += fmt::format("{:<{}}{:>9.5f}{:>8.3f}", r.kv, width, r.kl_mean, r.top1);
    for (const LongTextBucket& b : r.buckets) out += fmt::format("{:>9.5f}", b.kl);
    out += fmt::format("  {:.2f} ({:.2f} to {:.2f})\n", r.drift.ratio, r.drift.low, r.drift.high);
  }
  return out;
}

std::string long_text_json(const LongText& result, const LongTextOptions& options) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const LongTextRow& r : result.rows) {
    nlohmann::ordered_json buckets = nlohmann::ordered_json::array();
    for (const LongTextBucket& b : r.buckets)
      buckets.push_back({{"from", b.from}, {"to", b.to}, {"kl", b.kl}, {"top1", b.top1}});
    list.push_back({{"task", "long"},
                    {"kv", r.kv},
                    {"context", options.context},
                    {"tokens", options.tokens},
                    {"samples", options.samples},
                    {"kl_mean", r.kl_mean},
                    {"top1", r.top1},
                    {"buckets", std::move(buckets)},
                    {"drift", r.drift.ratio},
                    {"drift_low", r.drift.low},
                    {"drift_high", r.drift.high},
                    {"texts", result.texts}});
  }
  return list.dump(2) + "\n";
}

Outcome judge_long_text(const EvalFlags& flags) {
  if (flags.contexts.size() != 1)
    return Status(StatusCode::invalid_argument, "--task long takes one --context at a time");
  LongTextOptions options;
  options.context = flags.contexts.front();
  options.tokens = flags.tokens.value_or(options.tokens);
  options.samples = flags.samples.value_or(1);
  options.basis_path = flags.basis;
  options.n_threads = flags.options.n_threads;
  options.prompt = flags.options.prompt;
  options.seed = static_cast<uint32_t>(flags.seed);
  for (const KvProfile& p : flags.options.profiles) {
    if (p.name != KvProfile{}.name) options.profiles.push_back(p);
  }
  if (options.profiles.empty())
    return Status(StatusCode::invalid_argument, "--task long compares with f16: give another --kv beside it");
  const Result<std::string> text = read_text_file(flags.file.empty() ? kEvalFiller : flags.file);
  if (!text.ok()) return text.status();
  const Result<std::shared_ptr<const Model>> model = flags.load();
  if (!model.ok()) return model.status();
  const Result<std::vector<Token>> tokens = (*model)->tokenizer().encode(*text, true, false);
  if (!tokens.ok()) return tokens.status();
  ProgressBar bar(options.samples * (options.context + options.tokens));
  const Result<LongText> result = measure_long_text(*model, *tokens, options, bar.callback());
  if (!result.ok()) return result.status();
  return {write_stdout(flags.json ? long_text_json(*result, options) : long_text_table(*result)),
          Phase::at_work};
}

}  // namespace narrows::cli
