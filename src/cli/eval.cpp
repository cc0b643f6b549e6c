// `narrows eval`: what a cache profile costs in quality, on real text, against exact attention.
#include "eval/eval.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/eval_flags.h"
#include "cli/eval_long_text.h"
#include "cli/eval_needle.h"
#include "cli/eval_precision.h"
#include "cli/eval_task.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "peer/llama_peer.h"

namespace narrows::cli {
namespace {

constexpr const char* kFooter =
    R"(The first --context tokens of the text go through the model exactly; then each profile decodes the next --tokens
tokens of the text itself (teacher-forced) out of its own cache, and its predictions are compared with those of f16.
With --attention NAME the profiles' prompt attends in that precision, the reference in f32.

  ppl          perplexity of the text's tokens
  kl           mean and 99th percentile of the KL divergence to f16, nats a token
  top-1        share of steps that agree with f16 on the most likely token
  mass         share of the exact attention probability that falls on the tokens read (sparse layers)
  best         the same if as many tokens had been chosen by their exact probability
  smaller      f16 bytes by bytes allocated: whole cache | layers that the profile compresses | encoded pages alone

Examples:
  narrows eval -m model.gguf -f book.txt --kv klt --kv klt-10x --kv sals-25
  narrows eval -m model.gguf -f book.txt --context 2048 --kv f16 --peer llama.cpp --json
  narrows eval -m model.gguf -f book.txt --kv klt --peer-kv f16,q8_0,q4_0
  narrows eval -m model.gguf -f book.txt --kv f16 --attention bf16-shift
  narrows eval -m model.gguf --task needle --context 2048,4096 --kv f16 --kv klt --trials 4
  narrows eval -m model.gguf --task ruler --context 4096,8192 --kv klt --kv kivi-2 --samples 50 --resume ruler.jsonl
  narrows eval -m model.gguf --task file -f gsm8k.jsonl --score number --few-shot 8 --kv klt
  narrows eval -m model.gguf --task precision --json)";

std::string table(const std::vector<EvalRow>& rows) {
  std::string out = fmt::format("{:<24}{:>9}{:>10}{:>9}{:>8}{:>8}{:>8}{:>22}\n", "kv", "ppl", "kl mean",
                                "kl p99", "top-1", "mass", "best", "smaller");
  for (const EvalRow& r : rows) {
    // --peer's rows have no cache to count.
    const std::string smaller = r.cache.n_tokens == 0
                                    ? "-"
                                    : fmt::format("{:.2f} | {:.2f} | {:.2f}", r.compression(),
                                                  r.compression_layers(), r.compression_pages());
    out += fmt::format("{:<24}{:>9.3f}{:>10.5f}{:>9.4f}{:>8.3f}{:>8.4f}{:>8.4f}{:>22}\n", r.kv, r.ppl,
                       r.kl_mean, r.kl_p99, r.top1, r.mass_kept, r.mass_best, smaller);
  }
  return out;
}

std::string json(const std::vector<EvalRow>& rows, const EvalOptions& options) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const EvalRow& r : rows) {
    list.push_back({{"kv", r.kv},
                    {"reference", r.reference},
                    {"ppl", r.ppl},
                    {"kl_mean", r.kl_mean},
                    {"kl_p99", r.kl_p99},
                    {"top1", r.top1},
                    {"mass_kept", r.mass_kept},
                    {"mass_best", r.mass_best},
                    {"compression", r.compression()},
                    {"compression_layers", r.compression_layers()},
                    {"compression_pages", r.compression_pages()},
                    {"attention", attention_name(options.prompt.attention)},
                    {"prefill_mass", options.prompt.mass},
                    {"prefill_read", r.prompt_read},
                    {"bytes_per_token", r.bytes_per_token()},
                    {"bytes_per_token_f16", r.bytes_per_token_f16()},
                    {"context", options.context},
                    {"tokens", options.tokens}});
  }
  return list.dump(2) + "\n";
}

Outcome find(const EvalFlags& flags) {
  NeedleOptions options = flags.needle;
  options.contexts = flags.contexts;
  options.profiles = flags.options.profiles;
  options.basis_path = flags.basis;
  options.n_threads = flags.options.n_threads;
  options.prompt = flags.options.prompt;
  options.kind = flags.needles == "single"    ? NeedleKind::single
                 : flags.needles == "several" ? NeedleKind::several
                                              : NeedleKind::two_facts;
  Result<std::string> text = read_text_file(flags.file.empty() ? kEvalFiller : flags.file);
  if (!text.ok()) return text.status();
  options.filler = std::move(*text);
  const Result<std::shared_ptr<const Model>> model = flags.load();
  if (!model.ok()) return model.status();
  int64_t n_tokens = 0;
  for (const int64_t context : options.contexts) n_tokens += context * options.n_depth * options.trials;
  ProgressBar bar(n_tokens);
  const Result<std::vector<NeedleRow>> rows = find_needles(*model, options, bar.callback());
  if (!rows.ok()) return rows.status();
  return {write_stdout(flags.json ? needle_json(*rows, flags.needles) : needle_table(*rows)), Phase::at_work};
}

/// The heads of a model, --context tokens of the text (2048 unless it was given), and the random benchmark.
Outcome judge_precision(const EvalFlags& flags) {
  PrecisionOptions options;
  const PrefillAttention asked = flags.options.prompt.attention;
  if (asked != PrefillAttention::automatic) options.kernels = {asked};
  if (flags.context_given) options.context = flags.contexts.front();
  options.n_threads = flags.options.n_threads;
  const Result<std::string> text = read_text_file(flags.file.empty() ? kEvalFiller : flags.file);
  if (!text.ok()) return text.status();
  const Result<std::shared_ptr<const Model>> model = flags.model.load();
  if (!model.ok()) return model.status();
  const Result<std::vector<Token>> tokens = (*model)->tokenizer().encode(*text, true, false);
  if (!tokens.ok()) return tokens.status();
  ProgressBar bar(options.context);
  const Result<std::vector<PrecisionRow>> rows = measure_precision(*model, *tokens, options, bar.callback());
  if (!rows.ok()) return rows.status();
  return {write_stdout(flags.json ? precision_json(*rows) : precision_table(*rows)), Phase::at_work};
}

Outcome eval(EvalFlags& flags) {
  if (flags.task == "precision") return judge_precision(flags);
  if (flags.profiles.empty() && !flags.task.empty()) flags.profiles = {"f16", kDefaultProfile};
  for (const std::string& name : flags.profiles) {
    Result<KvProfile> profile = KvProfile::parse(name);
    if (!profile.ok()) return profile.status();
    flags.options.profiles.push_back(std::move(*profile));
  }
  if (flags.task == "ruler") return judge_ruler(flags);
  if (flags.task == "file") return judge_file(flags);
  if (flags.task == "long") return judge_long_text(flags);
  if (!flags.task.empty()) return find(flags);
  if (flags.file.empty() || flags.profiles.empty() || flags.contexts.size() != 1) {
    return Status(
        StatusCode::invalid_argument,
        "eval needs a text, a profile and one context: give -f FILE, --kv PROFILE and --context N, or a "
        "--task");
  }
  flags.options.context = flags.contexts.front();
  flags.options.tokens = flags.tokens.value_or(flags.options.tokens);
  flags.options.basis_path = flags.basis;
  flags.options.with_llama_cpp = !flags.peer.empty();
  Result<std::string> text = read_text_file(flags.file);
  if (!text.ok()) return text.status();
  const Result<std::shared_ptr<const Model>> model = flags.load();
  if (!model.ok()) return model.status();
  const Result<std::vector<Token>> tokens = (*model)->tokenizer().encode(*text, true, false);
  if (!tokens.ok()) return tokens.status();
  ProgressBar bar(flags.options.context + flags.options.tokens);
  const Result<std::vector<EvalRow>> rows = evaluate(*model, *tokens, flags.options, bar.callback());
  if (!rows.ok()) return rows.status();
  return {write_stdout(flags.json ? json(*rows, flags.options) : table(*rows)), Phase::at_work};
}

}  // namespace

Command make_eval_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("eval", "Measure what a cache profile costs in quality");
  auto flags = std::make_shared<EvalFlags>();
  flags->model.add_to(*command);
  flags->model.add_device_to(*command);
  command
      ->add_option("-f,--file", flags->file,
                   "text to measure on, or to hide needles in (UTF-8); or questions")
      ->type_name("FILE");
  command->add_option("--kv", flags->profiles, profile_help() + "; may be given several times")
      ->type_name("PROFILE")
      ->allow_extra_args(false);
  command
      ->add_option("--basis", flags->basis,
                   "basis file made by `narrows calibrate` (default: the prompt's own)")
      ->type_name("BASIS.gguf");
  CLI::Option* context =
      command
          ->add_option(
              "--context", flags->contexts,
              "tokens before the judged ones (default 4096; precision: 2048); needle, ruler: of prompt "
              "and answer, several: N,N,..; file: most that a prompt and its answer may have")
          ->type_name("N")
          ->delimiter(',')
          ->check(CLI::Range(int64_t{1}, int64_t{1} << 32));
  command
      ->add_option(
          "--task", flags->task,
          "instead of the text's own tokens, judge a task: needle (find facts hidden in a text), ruler "
          "(RULER's eleven), file (questions of -f, a JSON object a line), long (f16 writes on, KL by "
          "position) or precision (what each "
          "--attention costs on random numbers and on every head of the model)")
      ->type_name("TASK")
      ->check(CLI::IsMember({"needle", "ruler", "file", "long", "precision"}));
  add_task_options(*command, *flags);
  command
      ->add_option("--needles", flags->needles,
                   "single fact (default), several (one of ten is asked for), two-facts (both are needed)")
      ->type_name("KIND")
      ->check(CLI::IsMember({"single", "several", "two-facts"}));
  command->add_option("--trials", flags->needle.trials, "needle: texts a depth (default 2)")
      ->type_name("N")
      ->check(CLI::Range(int64_t{1}, int64_t{100000}));
  command->add_option("--depths", flags->needle.n_depth, "needle: depths from 0 to 100% (default 5)")
      ->type_name("N")
      ->check(CLI::Range(int64_t{1}, int64_t{1000}));
  command->add_option("--tokens", flags->tokens, "judged tokens (default 256; long: 1000)")
      ->type_name("N")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  command->add_option("--threads", flags->options.n_threads, "threads (default: one a core that it may use)")
      ->type_name("N")
      ->check(CLI::Range(1, 512));
  add_prompt_options(*command, flags->options.prompt);
  command->add_option("--peer", flags->peer, "add a row for llama.cpp with its own f16 cache")
      ->type_name("ENGINE")
      ->check(CLI::IsMember({"llama.cpp"}));
  command
      ->add_option("--peer-kv", flags->options.peer_kv,
                   fmt::format("rows for llama.cpp's own caches, against its f16: {}; or keys/values",
                               fmt::join(LlamaPeer::kv_types(), ", ")))
      ->type_name("CACHE[,CACHE]")
      ->delimiter(',')
      ->check(peer_cache());
  command
      ->add_option("--weights", flags->weights,
                   "file: as stored (default); f32: unpacked to float32, so that ggml does not round "
                   "activations to 8 bits and the "
                   "cache's error is seen alone (4 bytes a weight, slow)")
      ->type_name("KIND")
      ->check(CLI::IsMember({"file", "f32"}));
  command->add_flag("--json", flags->json,
                    "print one JSON document on standard output, and nothing else there");
  command->footer(kFooter);
  return {command, [flags, context] {
            flags->context_given = context->count() > 0;
            return eval(*flags);
          }};
}

}  // namespace narrows::cli
