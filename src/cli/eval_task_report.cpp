// Scores as tables and JSON.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "cli/eval_task.h"

namespace narrows::cli {

std::string task_table(const std::vector<TaskRow>& rows) {
  size_t width = 16;
  for (const TaskRow& r : rows) width = std::max(width, r.kv.size() + 2);
  std::string out = fmt::format("{:<18}{:>8}  {:<{}}{:>6}{:>8}{:>8}{:>8}{:>8}{:>10}  {}\n", "task", "context",
                                "kv", width, "n", "score", "better", "worse", "other", "to f16", "95 %");
  for (size_t i = 0; i < rows.size(); ++i) {
    const TaskRow& r = rows[i];
    if (i > 0 && (rows[i - 1].task != r.task || rows[i - 1].context != r.context)) out += "\n";
    out +=
        fmt::format("{:<18}{:>8}  {:<{}}{:>6}{:>8.1f}", r.task, r.context, r.kv, width, r.n, 100 * r.score);
    if (r.kv != "f16") {
      const PairedDifference& d = r.difference;
      const int64_t other = r.changed_text - d.better - d.worse;
      out += fmt::format("{:>8}{:>8}{:>8}{:>10.1f}  {:.1f} to {:.1f}{}", d.better, d.worse, other,
                         100 * d.mean, 100 * d.low, 100 * d.high, d.exact ? " (exact)" : "");
    }
    out += "\n";
  }
  return out;
}

std::string task_json(const std::vector<TaskRow>& rows, const TaskResult& result) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const TaskRow& r : rows) {
    const PairedDifference& d = r.difference;
    nlohmann::ordered_json row = {{"task", r.task},
                                  {"kv", r.kv},
                                  {"context", r.context},
                                  {"n", r.n},
                                  {"score", r.score},
                                  {"score_f16", r.score_f16},
                                  {"changed_better", d.better},
                                  {"changed_worse", d.worse},
                                  {"changed_text", r.changed_text},
                                  {"difference", d.mean},
                                  {"low", d.low},
                                  {"high", d.high},
                                  {"interval", d.exact ? "exact" : "bootstrap"},
                                  {"prompt_tokens", r.prompt_tokens},
                                  {"answer_tokens", r.answer_tokens}};
    nlohmann::ordered_json answers = nlohmann::ordered_json::array();
    for (const AnsweredItem& item : result.items) {
      if (item.id.task != r.task || (item.id.context != 0 && item.id.context != r.context)) continue;
      for (size_t p = 0; p < result.profiles.size(); ++p) {
        if (result.profiles[p] != r.kv) continue;
        answers.push_back({{"index", item.id.index},
                           {"expected", item.expected},
                           {"answer", item.answers[p].text},
                           {"score", item.scores[p]},
                           {"score_f16", item.scores[0]},
                           {"ended", item.answers[p].ended},
                           {"prompt_tokens", item.answers[p].prompt_tokens},
                           {"answer_tokens", item.answers[p].n_tokens}});
      }
    }
    if (!answers.empty()) row["answers"] = std::move(answers);
    list.push_back(std::move(row));
  }
  return list.dump(2) + "\n";
}

}  // namespace narrows::cli
