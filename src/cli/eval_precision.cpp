#include "cli/eval_precision.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <span>

namespace narrows::cli {
namespace {

/// Heads in the table; the JSON has all.
constexpr size_t kHeads = 16;

using Case = std::span<const PrecisionRow>;  ///< all kernels on one head

std::vector<Case> cases(const std::vector<PrecisionRow>& rows) {
  std::vector<Case> all;
  for (size_t i = 0, n = 0; i < rows.size(); i += n) {
    for (n = 1; i + n < rows.size() && rows[i + n].name == rows[i].name; ++n) {
    }
    all.emplace_back(rows.data() + i, n);
  }
  return all;
}

std::string cell(const PrecisionRow& r) {
  if (r.nan_rows == 0) return fmt::format("{:.1e}", r.rmse);
  const double share = static_cast<double>(r.nan_rows) / static_cast<double>(r.rows);
  return std::isnan(r.rmse) ? "NaN" : fmt::format("{:.1e} NaN {:.0f}%", r.rmse, 100 * share);
}

std::string line(const Case& c) {
  const PrecisionRow& first = c.front();
  std::string out = fmt::format("{:<56}{:>9.0f}{:>9.0f}{:>7.2f}", first.name, first.qk_max,
                                first.qk_max_shifted, first.resonance);
  for (const PrecisionRow& r : c) out += fmt::format("{:>17}", cell(r));
  return out + "\n";
}

}  // namespace

std::string precision_table(const std::vector<PrecisionRow>& rows) {
  std::vector<Case> random, heads;
  for (const Case& c : cases(rows)) (c.front().layer < 0 ? random : heads).push_back(c);
  std::stable_sort(heads.begin(), heads.end(),
                   [](const Case& a, const Case& b) { return a.front().qk_max > b.front().qk_max; });
  std::string out = fmt::format("{:<56}{:>9}{:>9}{:>7}", "case", "|q.k|", "shifted", "reson.");
  for (const PrecisionRow& r : (random.empty() ? heads : random).front())
    out += fmt::format("{:>17}", attention_name(r.kernel));
  out += "\n";
  for (const Case& c : random) out += line(c);
  for (size_t i = 0; i < std::min(kHeads, heads.size()); ++i) out += line(heads[i]);
  if (heads.size() > kHeads)
    out += fmt::format("({} heads with smaller |q.k| left out; --json has all)\n", heads.size() - kHeads);
  return out;
}

std::string precision_json(const std::vector<PrecisionRow>& rows) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const PrecisionRow& r : rows) {
    nlohmann::ordered_json row = {{"case", r.name}, {"kernel", attention_name(r.kernel)}};
    row["rmse"] = r.rmse;  // NaN becomes null
    row["nan_rows"] = r.nan_rows;
    row["rows"] = r.rows;
    row["head_dim"] = r.head_dim;
    row["length"] = r.length;
    row["layer"] = nullptr;
    row["head"] = nullptr;
    if (r.layer >= 0) {
      row["layer"] = r.layer;
      row["head"] = r.head;
    }
    row["qk_max"] = r.qk_max;
    row["qk_max_shifted"] = r.qk_max_shifted;
    row["resonance"] = r.resonance;
    list.push_back(std::move(row));
  }
  return list.dump(2) + "\n";
}

}  // namespace narrows::cli
