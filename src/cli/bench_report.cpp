#include "cli/bench_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "cli/output.h"

namespace narrows::cli {
namespace {

/// Cells of a table, the first row its head.
using Cells = std::vector<std::vector<std::string>>;

std::string number(double x, const char* format) {
  return x > 0 ? fmt::format(fmt::runtime(format), x) : "-";
}
std::string percent(double x) { return x > 0 ? fmt::format("{:.0f}%", 100 * x) : "-"; }
std::string range(const BenchSpeed& s) {
  return s.median > 0 ? fmt::format("({:.1f} - {:.1f})", s.min, s.max) : "-";
}

Cells speeds(const BenchReport& report) {
  Cells cells = {{"engine", "kv", "context", "prefill tok/s", "x peer", "of limit", "decode tok/s",
                  "(min - max)", "x peer", "of limit", "cache"}};
  for (const BenchRow& r : report.rows) {
    cells.push_back({r.engine, r.kv, std::to_string(r.context), number(r.prefill.median, "{:.1f}"),
                     number(r.prefill.vs_peer, "{:.2f}"), percent(r.prefill.share),
                     number(r.decode.median, "{:.1f}"), range(r.decode), number(r.decode.vs_peer, "{:.2f}"),
                     percent(r.decode.share), human_bytes(r.kv_bytes)});
  }
  return cells;
}

Cells stages(const BenchReport& report) {
  Cells cells = {{"kv", "context", "ms/token", "products", "score", "select", "rebuild", "attend", "rest",
                  "weights at GB/s"}};
  for (const BenchRow& r : report.rows) {
    if (!r.step) continue;
    const StepMs& s = *r.step;
    std::vector<std::string> row = {r.kv, std::to_string(r.context), fmt::format("{:.2f}", s.total())};
    for (const double ms : {s.products, s.score, s.select, s.rebuild, s.attend, s.rest})
      row.push_back(fmt::format("{:.2f}", ms));
    row.push_back(s.products > 0
                      ? fmt::format("{:.1f}", static_cast<double>(report.weight_bytes) / s.products / 1e6)
                      : "-");
    cells.push_back(std::move(row));
  }
  return cells;
}

/// Columns as wide as they need: names to the left, numbers to the right.
std::string aligned(const Cells& cells, size_t n_name) {
  std::vector<size_t> width(cells.front().size());
  for (const auto& row : cells) {
    for (size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
  }
  std::string out;
  for (const auto& row : cells) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string pad(width[i] - row[i].size(), ' ');
      line += (i > 0 ? "  " : "") + (i < n_name ? row[i] + pad : pad + row[i]);
    }
    out += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return out;
}

std::string markdown(const Cells& cells, size_t n_name) {
  std::string out;
  for (size_t i = 0; i < cells.size(); ++i) {
    out += "|";
    for (const std::string& cell : cells[i]) out += " " + cell + " |";
    out += "\n";
    if (i > 0) continue;
    out += "|";
    for (size_t c = 0; c < cells[0].size(); ++c) out += c < n_name ? "---|" : "---:|";
    out += "\n";
  }
  return out;
}

std::string machine_line(const BenchReport& report) {
  const MachineLimits& m = report.machine;
  return fmt::format(
      "limits, measured first with {} thread{}: memory read at {:.1f} GB/s, products at {:.2f} Tflop/s ({}); "
      "weights of {} a token\npeak resident memory of the process: {}\n",
      m.n_threads, m.n_threads == 1 ? "" : "s", m.read_bytes_s / 1e9, m.flops_s / 1e12, m.flops_format,
      human_bytes(report.weight_bytes), human_bytes(report.rows.back().peak_rss_bytes));
}

/// A row's figures in the order of the JSON document; CSV has the same, with step_ms and machine spread.
nlohmann::ordered_json row_json(const BenchReport& report, const BenchRow& r) {
  nlohmann::ordered_json row = {{"engine", r.engine},
                                {"kv", r.kv},
                                {"context", r.context},
                                {"prefill_tok_s", r.prefill.median},
                                {"prefill_tok_s_min", r.prefill.min},
                                {"prefill_tok_s_max", r.prefill.max},
                                {"prefill_vs_peer", r.prefill.vs_peer},
                                {"prefill_share", r.prefill.share},
                                {"decode_tok_s", r.decode.median},
                                {"decode_tok_s_min", r.decode.min},
                                {"decode_tok_s_max", r.decode.max},
                                {"decode_vs_peer", r.decode.vs_peer},
                                {"decode_share", r.decode.share},
                                {"kv_bytes", r.kv_bytes},
                                {"peak_rss_bytes", r.peak_rss_bytes},
                                {"step_ms", nullptr}};
  if (r.step) {
    row["step_ms"] = {{"products", r.step->products}, {"score", r.step->score},   {"select", r.step->select},
                      {"rebuild", r.step->rebuild},   {"attend", r.step->attend}, {"rest", r.step->rest}};
  }
  row["machine"] = {{"threads", report.machine.n_threads},
                    {"read_gb_s", report.machine.read_bytes_s / 1e9},
                    {"tflop_s", report.machine.flops_s / 1e12},
                    {"tflop_format", report.machine.flops_format},
                    {"weight_bytes", report.weight_bytes}};
  return row;
}

std::string json(const BenchReport& report) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const BenchRow& r : report.rows) list.push_back(row_json(report, r));
  return list.dump(2) + "\n";
}

/// No figure or name here needs quotes but a profile with several keys, whose name has commas.
std::string csv_cell(const nlohmann::ordered_json& value) {
  if (value.is_null()) return "";
  if (!value.is_string()) return value.dump();
  const auto& text = value.get_ref<const std::string&>();
  return text.find(',') == std::string::npos ? text : "\"" + text + "\"";
}

std::string csv(const BenchReport& report) {
  BenchRow full = report.rows.front();
  full.step = StepMs();
  const nlohmann::ordered_json columns = row_json(report, full);
  std::string head, body;
  const auto each = [](const nlohmann::ordered_json& shape, const auto& visit) {
    for (const auto& [key, value] : shape.items()) {
      if (!value.is_object()) {
        visit(key, std::string());
        continue;
      }
      for (const auto& inner : value.items()) visit(key, inner.key());
    }
  };
  each(columns, [&](const std::string& key, const std::string& inner) {
    head += (head.empty() ? "" : ",") + key + (inner.empty() ? "" : "_" + inner);
  });
  for (const BenchRow& r : report.rows) {
    const nlohmann::ordered_json row = row_json(report, r);
    std::string line;
    each(columns, [&](const std::string& key, const std::string& inner) {
      const nlohmann::ordered_json& value = row.at(key);
      const bool nothing = !inner.empty() && value.is_null();
      line +=
          (key == "engine" ? "" : ",") + (nothing ? "" : csv_cell(inner.empty() ? value : value.at(inner)));
    });
    body += line + "\n";
  }
  return head + "\n" + body;
}

}  // namespace

std::string bench_report(const BenchReport& report, BenchFormat format) {
  switch (format) {
    case BenchFormat::csv:
      return csv(report);
    case BenchFormat::json:
      return json(report);
    case BenchFormat::markdown:
      return markdown(speeds(report), 2) + "\n" + markdown(stages(report), 1) + "\n" + machine_line(report);
    case BenchFormat::table:
      break;
  }
  return aligned(speeds(report), 2) + "\nmilliseconds a decoded token\n" + aligned(stages(report), 1) + "\n" +
         machine_line(report);
}

}  // namespace narrows::cli
