// `narrows bench`: prefill and decode speed at given depths, beside llama.cpp in the same process.
#include "bench/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/interrupt.h"
#include "cli/output.h"

namespace narrows::cli {
namespace {

constexpr const char* kFooter =
    R"(Decoding goes in rounds, all engines and profiles in turn, after one round of warm-up; speeds are medians and the ratio
to llama.cpp is the median of the ratios round by round. All profiles of narrows share one prefill. Tokens come
from -f, or are ids that repeat a short pattern. peak RSS is that of the whole process, all engines together.

Examples:
  narrows bench -m model.gguf --context 0,4096 --kv f16,klt --peer llama.cpp
  narrows bench -m model.gguf --context 7600 -f report.txt --kv klt --json)";

struct BenchFlags {
  ModelFlags model;
  std::string file;
  std::vector<std::string> profiles = {"f16"};
  std::string peer;
  BenchOptions options;
  bool json = false;
};

std::string table(const std::vector<BenchRow>& rows) {
  std::string out = fmt::format("{:<10}{:<14}{:>8}{:>15}{:>14}{:>17}{:>10}{:>12}\n", "engine", "kv",
                                "context", "prefill tok/s", "decode tok/s", "(min - max)", "x peer", "kv");
  for (const BenchRow& r : rows) {
    out += fmt::format("{:<10}{:<14}{:>8}{:>15}{:>14.1f}{:>17}{:>10}{:>12}\n", r.engine, r.kv, r.context,
                       r.prefill_tok_s > 0 ? fmt::format("{:.1f}", r.prefill_tok_s) : "-", r.decode_tok_s,
                       fmt::format("({:.1f} - {:.1f})", r.decode_tok_s_min, r.decode_tok_s_max),
                       r.decode_vs_peer > 0 ? fmt::format("{:.2f}", r.decode_vs_peer) : "-",
                       human_bytes(r.kv_bytes));
  }
  return out +
         fmt::format("peak resident memory of the process: {}\n", human_bytes(rows.back().peak_rss_bytes));
}

std::string json(const std::vector<BenchRow>& rows) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const BenchRow& r : rows) {
    list.push_back({{"engine", r.engine},
                    {"kv", r.kv},
                    {"context", r.context},
                    {"prefill_tok_s", r.prefill_tok_s},
                    {"decode_tok_s", r.decode_tok_s},
                    {"decode_tok_s_min", r.decode_tok_s_min},
                    {"decode_tok_s_max", r.decode_tok_s_max},
                    {"decode_vs_peer", r.decode_vs_peer},
                    {"kv_bytes", r.kv_bytes},
                    {"peak_rss_bytes", r.peak_rss_bytes}});
  }
  return list.dump(2) + "\n";
}

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
  const Result<std::vector<BenchRow>> rows = run_bench(*model, *text, flags.options, progress);
  if (!rows.ok()) return rows.status();
  return {write_stdout(flags.json ? json(*rows) : table(*rows)), Phase::at_work};
}

}  // namespace

Command make_bench_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("bench", "Measure speed, beside llama.cpp in the same process");
  auto flags = std::make_shared<BenchFlags>();
  flags->model.add_to(*command);
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
  command->add_option("--peer", flags->peer, "measure this engine in the same rounds")
      ->type_name("ENGINE")
      ->check(CLI::IsMember({"llama.cpp"}));
  command->add_option("--rounds", flags->options.rounds, "counted decode rounds (default 5)")
      ->type_name("N")
      ->check(CLI::Range(1, 1000));
  command->add_option("--tokens", flags->options.tokens, "tokens decoded a round (default 32)")
      ->type_name("N")
      ->check(CLI::Range(1, 100000));
  command->add_option("--threads", flags->options.n_threads, "threads (default: one a core)")
      ->type_name("N")
      ->check(CLI::Range(1, 512));
  add_products_option(*command, flags->options.products);
  add_attention_option(*command, flags->options.attention);
  command->add_flag("--json", flags->json,
                    "print one JSON document on standard output, and nothing else there");
  command->footer(kFooter);
  return {command, [flags] { return bench(*flags); }};
}

}  // namespace narrows::cli
