// `narrows calibrate`: a basis file for the klt and SALS profiles, from texts or from what the model writes
// itself.
#include <fmt/format.h>

#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "calibrate/key_statistics.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/output.h"
#include "cli/progress.h"

namespace narrows::cli {
namespace {

/// Tokens that the model writes when no text is given: one sequence of the paper's calibration.
constexpr int64_t kOwnTokens = 4096;

constexpr const char* kFooter =
    R"(A basis file is not needed: without one, the prompt calibrates its own cache once it is long enough. With one, short
prompts are compressed too, and caches of one model share a basis. The file belongs to one model and names it.

Examples:
  narrows calibrate -m model.gguf -f book.txt -f code.txt -o basis.gguf
  narrows calibrate -m model.gguf -o basis.gguf            the model writes its own text
  narrows run -m model.gguf --basis basis.gguf -p "..." )";

struct CalibrateFlags {
  ModelFlags model;
  std::vector<std::string> files;
  std::string output;
  int threads = 0;
};

Outcome calibrate_command(const CalibrateFlags& flags) {
  if (Status s = check_writable(flags.output); !s.ok()) return s;
  std::string text, made_from;
  for (const std::string& path : flags.files) {
    Result<std::string> content = read_text_file(path);
    if (!content.ok()) return content.status();
    text = join_parts({text, *content});
    const size_t slash = path.find_last_of('/');
    made_from +=
        (made_from.empty() ? "" : ", ") + (slash == std::string::npos ? path : path.substr(slash + 1));
  }
  const Result<std::shared_ptr<const Model>> model = flags.model.load();
  if (!model.ok()) return model.status();
  Result<std::vector<Token>> tokens = std::vector<Token>();
  if (flags.files.empty()) {
    made_from = fmt::format("{} tokens written by the model", kOwnTokens);
    ProgressBar bar(kOwnTokens);
    tokens = write_own_text(*model, kOwnTokens, flags.threads, bar.callback());
  } else {
    tokens = (*model)->tokenizer().encode(text, true, false);
  }
  if (!tokens.ok()) return tokens.status();
  ProgressBar bar(static_cast<int64_t>(tokens->size()));
  const Result<BasisFile> basis = calibrate(**model, *tokens, made_from, flags.threads, bar.callback());
  if (!basis.ok()) return basis.status();
  if (Status s = write_basis_file(flags.output, *basis, (*model)->info()); !s.ok())
    return {std::move(s), Phase::at_work};
  note(fmt::format("[{}: bases of {} layers from {} tokens ({})]", flags.output, basis->layers.size(),
                   basis->n_tokens, made_from));
  return {};
}

}  // namespace

Command make_calibrate_command(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("calibrate", "Make a basis file for the klt and SALS cache profiles");
  auto flags = std::make_shared<CalibrateFlags>();
  flags->model.add_to(*command);
  command->add_option("-f,--file", flags->files, "text to calibrate on; may be given several times")
      ->type_name("FILE")
      ->allow_extra_args(false);
  command->add_option("-o,--output", flags->output, "basis file to write")
      ->type_name("BASIS.gguf")
      ->required();
  command->add_option("--threads", flags->threads, "threads (default: one a core that it may use)")
      ->type_name("N")
      ->check(CLI::Range(1, 512));
  command->footer(kFooter);
  return {command, [flags] { return calibrate_command(*flags); }};
}

}  // namespace narrows::cli
