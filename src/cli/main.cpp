// The program: picks the command, turns its Outcome into a sentence and an exit code. The library neither
// prints nor exits, and nothing throws past this file.
#include <fmt/format.h>

#include <exception>
#include <new>
#include <string>
#include <vector>

#include "base/utf8.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "kernels/ops.h"

#ifndef NARROWS_VERSION
#define NARROWS_VERSION "unknown"
#endif

namespace narrows::cli {
namespace {

/// In the order of the help text.
constexpr Command (*kMakers[])(CLI::App&) = {
    make_run_command,   make_serve_command,     make_eval_command,
    make_bench_command, make_calibrate_command, make_inspect_command,
};

constexpr const char* kFooter =
    R"(`narrows COMMAND --help` explains a command. Exit codes: 0 done, 1 the work failed, 2 the command line or an input
file is wrong.

Example:
  narrows run -m model.gguf -f report.txt -p "What are the three main findings?")";

int finish(const Outcome& outcome) {
  if (!outcome.status.ok()) print_error(outcome.status);
  return exit_code(outcome);
}

/// Help and version are results and go to stdout.
int print(const std::string& text) { return finish({write_stdout(text), Phase::at_work}); }

std::string command_names(const std::vector<Command>& commands) {
  std::string names;
  for (const Command& command : commands) names += (names.empty() ? "" : ", ") + command.app->get_name();
  return names;
}

/// For a line that names no command, or one that does not exist.
Status no_command(int argc, char** argv, const std::vector<Command>& commands) {
  const std::string names = command_names(commands);
  if (argc > 1 && argv[1][0] != '-') {
    return {StatusCode::invalid_argument,
            fmt::format("there is no command {}; the commands are {}, see narrows --help", quote(argv[1]),
                        names)};
  }
  return {StatusCode::invalid_argument, fmt::format("name a command: {}; see narrows --help", names)};
}

/// CLI11 throws what it finds wrong; its texts name the flag and the value.
Status parse(CLI::App& app, int argc, char** argv, const std::vector<Command>& commands,
             std::string& to_print) {
  try {
    app.parse(argc, argv);
    return {};
  } catch (const CLI::CallForHelp&) {
    to_print = app.help();
    return {};
  } catch (const CLI::CallForVersion& version) {
    to_print = std::string(version.what()) + "\n";
    return {};
  } catch (const CLI::ParseError& error) {
    for (const Command& command : commands) {
      if (command.app->parsed()) {
        return {StatusCode::invalid_argument,
                fmt::format("{}; see narrows {} --help", error.what(), command.app->get_name())};
      }
    }
    return no_command(argc, argv, commands);
  }
}

int run(int argc, char** argv) {
  CLI::App app("narrows: long contexts of GGUF language models on ordinary machines", "narrows");
  app.set_version_flag("--version", "narrows " NARROWS_VERSION);
  app.footer(kFooter);
  app.require_subcommand(1);
  std::vector<Command> commands;
  for (const auto make : kMakers) commands.push_back(make(app));

  std::string to_print;
  if (Status status = parse(app, argc, argv, commands, to_print); !status.ok()) return finish(status);
  if (!to_print.empty()) return print(to_print);
  for (const Command& command : commands) {
    if (command.app->parsed()) return finish(command.run());
  }
  return finish(Status(StatusCode::internal, "no command was chosen (cli/main.cpp)"));
}

}  // namespace
}  // namespace narrows::cli

int main(int argc, char** argv) {
  using namespace narrows;
  try {
    cli::open_missing_streams();
    cli::install_signal_handlers();
    if (Status status = kernels::check_forced_target(); !status.ok()) return cli::finish(status);
    return cli::run(argc, argv);
  } catch (const std::bad_alloc&) {
    cli::print_error(
        {StatusCode::out_of_memory, "the system gives no more memory; a smaller --ctx needs less"});
  } catch (const std::exception& error) {
    cli::print_error({StatusCode::internal, fmt::format("an error that nobody caught: {}", error.what())});
  }
  return cli::kExitFailed;
}
