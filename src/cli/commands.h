// The commands of `narrows`. To add one: write make_<name>_command() in a file of its own, declare it here,
// and put it into the table in main.cpp.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

#include "cli/exit_code.h"

namespace narrows::cli {

/// A subcommand on the app, and what to call when the user chose it. The options that CLI11 fills live in
/// `run`.
struct Command {
  CLI::App* app;
  std::function<Outcome()> run;
};

Command make_run_command(CLI::App& app);
Command make_eval_command(CLI::App& app);
Command make_bench_command(CLI::App& app);
Command make_calibrate_command(CLI::App& app);
Command make_inspect_command(CLI::App& app);
Command make_serve_command(CLI::App& app);

}  // namespace narrows::cli
