#include "cli/eval_needle.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

namespace narrows::cli {

std::string needle_table(const std::vector<NeedleRow>& rows) {
  std::string out =
      fmt::format("{:<24}{:>9}   found of tried at depth ..{:>24}\n", "kv", "context", "all (95%)");
  for (size_t i = 0; i < rows.size();) {
    const NeedleRow& first = rows[i];
    out += fmt::format("{:<24}{:>9}  ", first.kv, first.context);
    int64_t found = 0;
    int64_t trials = 0;
    for (; i < rows.size() && rows[i].kv == first.kv && rows[i].context == first.context; ++i) {
      out += fmt::format(" {:>3.0f}%: {}/{} ", 100 * rows[i].depth, rows[i].found, rows[i].trials);
      found += rows[i].found;
      trials += rows[i].trials;
    }
    const Interval sure = wilson_interval(found, trials);
    out += fmt::format("  {:.2f} ({:.2f} - {:.2f})\n",
                       static_cast<double>(found) / static_cast<double>(trials), sure.low, sure.high);
  }
  return out;
}

std::string needle_json(const std::vector<NeedleRow>& rows, const std::string& kind) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const NeedleRow& r : rows) {
    const Interval sure = wilson_interval(r.found, r.trials);
    list.push_back({{"kv", r.kv},
                    {"context", r.context},
                    {"depth", r.depth},
                    {"correct", static_cast<double>(r.found) / static_cast<double>(r.trials)},
                    {"trials", r.trials},
                    {"low", sure.low},
                    {"high", sure.high},
                    {"kind", kind}});
  }
  return list.dump(2) + "\n";
}

}  // namespace narrows::cli
