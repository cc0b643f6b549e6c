// The four formats of `narrows bench`: the same figures, readable by what they are meant for.
#include "cli/bench_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

namespace narrows::cli {
namespace {

using ::testing::HasSubstr;

BenchReport two_rows() {
  BenchReport report;
  report.machine = {2, 40e9, 0.5e12, "bf16"};
  report.weight_bytes = 100'000'000;
  BenchRow ours;
  ours.engine = "narrows";
  ours.kv = "klt:k=2,v=3";
  ours.context = 4096;
  ours.prefill = {1000, 900, 1100, 3.5, 0.4};
  ours.decode = {200, 190, 210, 2.5, 0.5};
  ours.step = StepMs{2.5, 0.5, 0.25, 0.125, 1.0, 0.625};
  ours.kv_bytes = 20'000'000;
  ours.peak_rss_bytes = 300'000'000;
  BenchRow peer;
  peer.engine = "llama.cpp";
  peer.kv = "q8_0";
  peer.decode = {80, 79, 81, 0, 0.2};
  peer.kv_bytes = 500'000;
  peer.peak_rss_bytes = 400'000'000;
  report.rows = {ours, peer};
  return report;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

TEST(BenchReport, JsonHasTheContractsKeysAndTheStages) {
  const auto list = nlohmann::json::parse(bench_report(two_rows(), BenchFormat::json));
  ASSERT_EQ(list.size(), 2U);
  for (const auto& row : list) {
    for (const char* key :
         {"engine", "kv", "context", "prefill_tok_s", "decode_tok_s", "kv_bytes", "peak_rss_bytes"})
      EXPECT_TRUE(row.contains(key)) << key;
    EXPECT_EQ(row["machine"]["read_gb_s"], 40);
    EXPECT_EQ(row["machine"]["tflop_s"], 0.5);
    EXPECT_EQ(row["machine"]["weight_bytes"], 100'000'000);
  }
  EXPECT_EQ(list[0]["prefill_vs_peer"], 3.5);
  EXPECT_EQ(list[0]["decode_share"], 0.5);
  EXPECT_EQ(list[0]["step_ms"]["rebuild"], 0.125);
  EXPECT_TRUE(list[1]["step_ms"].is_null());
}

TEST(BenchReport, CsvHasAsManyCellsInEveryLine) {
  const auto lines = lines_of(bench_report(two_rows(), BenchFormat::csv));
  ASSERT_EQ(lines.size(), 3U);
  const auto commas = [](const std::string& line) { return std::count(line.begin(), line.end(), ','); };
  EXPECT_THAT(lines[0], HasSubstr("engine,kv,context,prefill_tok_s,"));
  EXPECT_THAT(lines[0],
              HasSubstr(",step_ms_products,step_ms_score,step_ms_select,step_ms_rebuild,step_ms_attend,"
                        "step_ms_rest,machine_threads,machine_read_gb_s,"));
  EXPECT_THAT(lines[1], HasSubstr("narrows,\"klt:k=2,v=3\",4096,1000.0,900.0,1100.0,3.5,0.4,200.0,"));
  EXPECT_THAT(lines[1], HasSubstr(",2.5,0.5,0.25,0.125,1.0,0.625,2,40.0,0.5,bf16,100000000"));
  EXPECT_THAT(lines[2], HasSubstr("llama.cpp,q8_0,0,0.0,"));
  EXPECT_THAT(lines[2], HasSubstr(",400000000,,,,,,,2,"));
  EXPECT_EQ(commas(lines[0]), commas(lines[1]) - 1);  // one is in quotes
  EXPECT_EQ(commas(lines[0]), commas(lines[2]));
}

TEST(BenchReport, MarkdownIsTwoTables) {
  const std::string text = bench_report(two_rows(), BenchFormat::markdown);
  const auto lines = lines_of(text);
  ASSERT_GT(lines.size(), 8U);
  const auto bars = [](const std::string& line) { return std::count(line.begin(), line.end(), '|'); };
  for (size_t i = 1; i < 4; ++i) EXPECT_EQ(bars(lines[i]), bars(lines[0])) << lines[i];
  EXPECT_EQ(lines[4], "");
  for (size_t i = 6; i < 8; ++i) EXPECT_EQ(bars(lines[i]), bars(lines[5])) << lines[i];
  EXPECT_EQ(lines[8], "");  // stages of narrows alone
  EXPECT_THAT(lines[1], HasSubstr("|---|---|---:|"));
  EXPECT_THAT(lines[2],
              HasSubstr("| narrows | klt:k=2,v=3 | 4096 | 1000.0 | 3.50 | 40% | 200.0 | (190.0 - 210.0) | "
                        "2.50 | 50% | 20.0 MB |"));
  EXPECT_THAT(lines[3], HasSubstr("| llama.cpp | q8_0 | 0 | - | - | - | 80.0 |"));
  EXPECT_THAT(lines[7],
              HasSubstr("| klt:k=2,v=3 | 4096 | 5.00 | 2.50 | 0.50 | 0.25 | 0.12 | 1.00 | 0.62 | 40.0 |"));
}

TEST(BenchReport, TheTableIsAlignedAndSaysTheLimits) {
  const std::string text = bench_report(two_rows(), BenchFormat::table);
  const auto lines = lines_of(text);
  EXPECT_EQ(lines[0].size(), lines[1].size());
  EXPECT_EQ(lines[0].size(), lines[2].size());
  EXPECT_EQ(lines[0].find("decode tok/s") + 12, lines[1].find("200.0") + 5);
  EXPECT_THAT(
      text,
      HasSubstr("2 threads: memory read at 40.0 GB/s, products at 0.50 Tflop/s (bf16); weights of 100 MB"));
  EXPECT_THAT(text, HasSubstr("peak resident memory of the process: 400 MB"));
}

}  // namespace
}  // namespace narrows::cli
