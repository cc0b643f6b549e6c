// `narrows bench`: prefill and decode speed at given depths, beside llama.cpp in the same process.
#include "bench/bench.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cli/bench_report.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "peer/llama_peer.h"

namespace narrows::cli {
namespace {

constexpr const char* kFooter =
    R"(Decoding goes in rounds, all engines and profiles in turn, after one round of warm-up; speeds are medians and the ratio
to llama.cpp is the median of the ratios round by round, to its first cache. All profiles of narrows share one prefill; it
is measured once unless --prefill-rounds says more. Tokens come from -f, or are ids that repeat a short pattern.

The machine's limits are measured first: how fast all threads read memory, and how fast they multiply. "of limit" is, for
prefill, the share of that speed at which a prompt's operations are done; for decoding, the share of the reading speed at
which the weights alone pass by: what is missing to 100% goes to the cache, to waiting and to slow kernels. On a shared
machine the limits drift, and a share may exceed 100%. The stages of a token of narrows are products (norms and
activations with them), score, select, rebuild and attend of docs/klt.md, and the rest; waiting for other threads counts in
each. peak RSS is that of the whole process, all engines together.

Examples:
  narrows bench -m model.gguf --context 0,4096 --kv f16,klt --peer llama.cpp
  narrows bench -m model.gguf --context 4096 --kv klt --peer llama.cpp --peer-kv f16,q8_0 --prefill-rounds 5 --format markdown
  narrows bench -m model.gguf --context 7600 -f report.txt --kv klt --json)";

struct BenchFlags {
  ModelFlags model;
  std::string file;
  std::vector<std::string> profiles = {"f16"};
  std::string peer;
  BenchOptions options;
  BenchFormat format = BenchFormat::table;
  bool json = false;
};

/// Enough tokens of the file, repeated as often as needed, or a pattern of ordinary ids.
Result<std::vector<Token>> bench_text(const BenchFlags& flags, const Model& model, int64_t n) {
  std::vector<Token> unit;
  if (flags.file.empty()) {
    for (Token t = 1000; t < 1997 && t < model.info().n_vocab; ++t) unit.push_back(t);
    if (unit.empty()) unit.push_back(0);
  } else {
    Result<std::string> text = read_text_file(flags.file);
    if (!text.ok()) return text.status();
    Result<std::vector<Token>> tokens = model.tokenizer().encode(*text, true, false);
    if (!tokens.ok()) return tokens.status();
    if (tokens->empty())
      return {StatusCode::invalid_argument, flags.file + ": has no tokens, give a longer text"};
    unit = std::move(*tokens);
  }
  std::vector<Token> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(unit[static_cast<size_t>(i) % unit.size()]);
  return out;
}

Outcome bench(BenchFlags& flags) {
  for (const std::string& name : flags.profiles) {
    Result<KvProfile> profile = KvProfile::parse(name);
    if (!profile.ok()) return profile.status();
    flags.options.profiles.push_back(std::move(*profile));
  }
  flags.options.with_llama_cpp = !flags.peer.empty();
  const Result<std::shared_ptr<const Model>> model = flags.model.load();
  if (!model.ok()) return model.status();
  const int64_t deepest = *std::max_element(flags.options.contexts.begin(), flags.options.contexts.end());
  const int64_t n = deepest + 2 + int64_t{flags.options.rounds + 1} * flags.options.tokens;
  const Result<std::vector<Token>> text = bench_text(flags, **model, n);
  if (!text.ok()) return text.status();
  const auto progress = [](const std::string& what) {
    if (stderr_is_terminal()) note("[" + what + "]");
    return !interrupted();
  };
  const Result<BenchReport> report = run_bench(*model, *text, flags.options, progress);
  if (!report.ok()) return report.status();
  return {write_stdout(bench_report(*report, flags.json ? BenchFormat::json : flags.format)), Phase::at_work};
}

}  // namespace

Command make_bench_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("bench", "Measure speed, beside llama.cpp in the same process");
  auto flags = std::make_shared<BenchFlags>();
  flags->model.add_to(*command);
  flags->model.add_device_to(*command);
  command
      ->add_option("--context", flags->options.contexts,
                   "depths: tokens in the cache before decoding, e.g. 0,4096")
      ->type_name("N[,N]")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 32));
  command->add_option("--kv", flags->profiles, profile_help())
      ->type_name("PROFILE[,PROFILE]")
      ->delimiter(',');
  command->add_option("--basis", flags->options.basis_path, "basis file made by `narrows calibrate`")
      ->type_name("BASIS.gguf");
  command->add_option("-f,--file", flags->file, "text whose tokens are used (repeated if it is short)")
      ->type_name("FILE");
  CLI::Option* peer = command->add_option("--peer", flags->peer, "measure this engine in the same rounds")
                          ->type_name("ENGINE")
                          ->check(CLI::IsMember({"llama.cpp"}));
  command
      ->add_option("--peer-kv", flags->options.peer_kv,
                   fmt::format("caches of the peer, a row each: {} (default f16)",
                               fmt::join(LlamaPeer::kv_types(), ", ")))
      ->type_name("CACHE[,CACHE]")
      ->delimiter(',')
      ->check(peer_cache())
      ->needs(peer);
  command->add_option("--rounds", flags->options.rounds, "counted decode rounds (default 5)")
      ->type_name("N")
      ->check(CLI::Range(1, 1000));
  command->add_option("--tokens", flags->options.tokens, "tokens decoded a round (default 32)")
      ->type_name("N")
      ->check(CLI::Range(1, 100000));
  command->add_option("--prefill-rounds", flags->options.prefill_rounds, "prefills a depth (default 1)")
      ->type_name("N")
      ->check(CLI::Range(1, 1000));
  command->add_option("--threads", flags->options.n_threads, "threads (default: one a core that it may use)")
      ->type_name("N")
      ->check(CLI::Range(1, 512));
  add_prompt_options(*command, flags->options.prompt);
  const std::map<std::string, BenchFormat> formats = {{"table", BenchFormat::table},
                                                      {"markdown", BenchFormat::markdown},
                                                      {"csv", BenchFormat::csv},
                                                      {"json", BenchFormat::json}};
  CLI::Option* format =
      command->add_option("--format", flags->format, "table (default), markdown, csv or json")
          ->type_name("FORMAT")
          ->transform(CLI::CheckedTransformer(formats));
  command
      ->add_flag("--json", flags->json, "print one JSON document on standard output, and nothing else there")
      ->excludes(format);
  command->footer(kFooter);
  return {command, [flags] { return bench(*flags); }};
}

}  // namespace narrows::cli
