// What `narrows bench` prints: a table to read, Markdown to paste, CSV and JSON for other programs.
#pragma once

#include <string>

#include "bench/bench.h"

namespace narrows::cli {

enum class BenchFormat { table, markdown, csv, json };

/// report has at least one row.
std::string bench_report(const BenchReport& report, BenchFormat format);

}  // namespace narrows::cli
