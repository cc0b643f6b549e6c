// `narrows inspect`: a model's shapes, what its cache takes under every profile, and how its key spectrum
// falls.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "calibrate/spectrum.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/output.h"
#include "cli/progress.h"

namespace narrows::cli {
namespace {

constexpr int64_t kDefaultContext = 8192;
constexpr int64_t kMaxContext = 1'000'000'000;

constexpr const char* kFooter =
    R"(The cache sizes follow from the layout; no cache is made. With -f, the text (cut to the context) goes through
the model, and each layer's keys before rotation show how much of their variance the strongest 1/8, 1/4 and 1/2 of the
coordinates carry: what a low-rank cache can keep.

Examples:
  narrows inspect -m model.gguf --context 32768
  narrows inspect -m model.gguf -f report.txt --json)";

struct InspectFlags {
  ModelFlags model;
  std::optional<int64_t> context;
  std::optional<int> threads;
  std::string file;
  bool json = false;
};

struct CacheSize {
  std::string profile;
  int64_t bytes;
  double bytes_a_token;
  double compression;
};

std::vector<CacheSize> cache_sizes(const Model& model, int64_t n_tokens) {
  std::vector<CacheSize> sizes;
  const int64_t bytes_f16 = cache_bytes_estimate(model, KvProfile(), n_tokens);
  for (const std::string& name : KvProfile::names()) {
    const Result<KvProfile> profile = KvProfile::parse(name);
    if (!profile.ok()) continue;  // names() lists only what parse() takes; tests/base/config_test.cpp
    const int64_t bytes = cache_bytes_estimate(model, *profile, n_tokens);
    sizes.push_back({name, bytes, static_cast<double>(bytes) / static_cast<double>(n_tokens),
                     bytes > 0 ? static_cast<double>(bytes_f16) / static_cast<double>(bytes) : 0});
  }
  return sizes;
}

Result<std::vector<LayerSpectrum>> spectrum_of(const Model& model, const std::string& text, int64_t context,
                                               int n_threads) {
  Result<std::vector<Token>> tokens = model.tokenizer().encode(text, true, false);
  if (!tokens.ok()) return tokens.status();
  if (tokens->empty())
    return {StatusCode::invalid_argument, "the text of -f has no tokens: give a longer one"};
  if (static_cast<int64_t>(tokens->size()) > context) {
    note(fmt::format("[using the first {} of the text's {} tokens]", context, tokens->size()));
    tokens->resize(static_cast<size_t>(context));
  }
  ProgressBar bar(static_cast<int64_t>(tokens->size()));
  return key_spectrum(model, *tokens, n_threads, bar.callback());
}

std::string feed_forward(const ModelInfo& m) {
  if (m.n_expert == 0) return fmt::format("feed-forward {}", m.n_ff);
  return fmt::format("{} experts of feed-forward {}, {} of them a token", m.n_expert, m.n_ff,
                     m.n_expert_used);
}

/// What kinds of layers there are, where not all attend to all.
std::string layer_kinds(const ModelInfo& m) {
  if (m.n_layer_recurrent + m.n_layer_windowed == 0) return "";
  std::vector<std::string> kinds;
  if (m.n_layer_recurrent > 0) {
    kinds.push_back(fmt::format("{} of gated DeltaNet (states of {} a sequence, with every profile)",
                                m.n_layer_recurrent, human_bytes(m.recurrent_bytes)));
  }
  if (m.n_layer_windowed > 0)
    kinds.push_back(fmt::format("{} attend to a window (exact, with every profile)", m.n_layer_windowed));
  kinds.push_back(fmt::format("{} attend to all", m.n_layer - m.n_layer_recurrent - m.n_layer_windowed));
  return fmt::format("layers     {}\n", fmt::join(kinds, ", "));
}

std::string text_report(const ModelInfo& m, int64_t context, const std::vector<CacheSize>& sizes,
                        const std::vector<LayerSpectrum>& spectrum) {
  std::string out = fmt::format(
      "model      {} ({}), {} of weights, fingerprint {}\n"
      "shape      {} layers of width {}, {} query heads and {} key/value heads of {}, {}, "
      "vocabulary {}\n"
      "{}"
      "made for   {} tokens of context\n\n"
      "cache at {} tokens\n{:<12}{:>14}{:>14}{:>10}\n",
      m.name.empty() ? "without a name" : m.name, m.architecture, human_bytes(m.weight_bytes), m.fingerprint,
      m.n_layer, m.n_embd, m.n_head, m.n_head_kv, m.head_dim, feed_forward(m), m.n_vocab, layer_kinds(m),
      m.n_ctx_train, context, "profile", "whole", "bytes/token", "ratio");
  for (const CacheSize& size : sizes) {
    out += fmt::format("{:<12}{:>14}{:>14.1f}{:>10.2f}\n", size.profile, human_bytes(size.bytes),
                       size.bytes_a_token, size.compression);
  }
  if (spectrum.empty())
    return out + "\nkey spectrum: give a text with -f FILE to see how it falls, layer by layer\n";
  out +=
      fmt::format("\nshare of the keys' variance in the strongest coordinates\n{:<8}{:>8}{:>8}{:>8}{:>12}\n",
                  "layer", "1/8", "1/4", "1/2", "|mean|/sd");
  for (const LayerSpectrum& layer : spectrum) {
    out += fmt::format("{:<8}{:>8.4f}{:>8.4f}{:>8.4f}{:>12.2f}\n", layer.layer, layer.share_8th,
                       layer.share_4th, layer.share_half, layer.mean_over_sd);
  }
  return out;
}

std::string json_report(const ModelInfo& m, int64_t context, const std::vector<CacheSize>& sizes,
                        const std::vector<LayerSpectrum>& spectrum) {
  nlohmann::ordered_json document = {
      {"model",
       {{"name", m.name},
        {"architecture", m.architecture},
        {"fingerprint", m.fingerprint},
        {"n_layer", m.n_layer},
        {"n_layer_recurrent", m.n_layer_recurrent},
        {"n_layer_windowed", m.n_layer_windowed},
        {"recurrent_bytes", m.recurrent_bytes},
        {"n_embd", m.n_embd},
        {"n_ff", m.n_ff},
        {"n_expert", m.n_expert},
        {"n_expert_used", m.n_expert_used},
        {"n_head", m.n_head},
        {"n_head_kv", m.n_head_kv},
        {"head_dim", m.head_dim},
        {"n_vocab", m.n_vocab},
        {"n_ctx_train", m.n_ctx_train},
        {"weight_bytes", m.weight_bytes}}},
      {"context", context},
      {"cache", nlohmann::ordered_json::array()},
      {"key_spectrum", nlohmann::ordered_json::array()},
  };
  for (const CacheSize& size : sizes) {
    document["cache"].push_back({{"kv", size.profile},
                                 {"bytes", size.bytes},
                                 {"bytes_per_token", size.bytes_a_token},
                                 {"compression", size.compression}});
  }
  for (const LayerSpectrum& layer : spectrum) {
    document["key_spectrum"].push_back({{"layer", layer.layer},
                                        {"share_8th", layer.share_8th},
                                        {"share_4th", layer.share_4th},
                                        {"share_half", layer.share_half},
                                        {"mean_over_sd", layer.mean_over_sd}});
  }
  // A model's name may be any bytes.
  return document.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

Outcome inspect(const InspectFlags& flags) {
  std::string text;
  if (!flags.file.empty()) {
    Result<std::string> content = read_text_file(flags.file);
    if (!content.ok()) return content.status();
    text = std::move(content).value();
  }
  const Result<std::shared_ptr<const Model>> model = flags.model.load();
  if (!model.ok()) return model.status();
  const ModelInfo& info = (*model)->info();
  const int64_t context = flags.context.value_or(std::min(kDefaultContext, info.n_ctx_train));
  const std::vector<CacheSize> sizes = cache_sizes(**model, context);
  std::vector<LayerSpectrum> spectrum;
  if (!flags.file.empty()) {
    Result<std::vector<LayerSpectrum>> computed =
        spectrum_of(**model, text, context, flags.threads.value_or(0));
    if (!computed.ok()) return {computed.status(), Phase::at_work};
    spectrum = std::move(computed).value();
  }
  Status status = write_stdout(flags.json ? json_report(info, context, sizes, spectrum)
                                          : text_report(info, context, sizes, spectrum));
  return {std::move(status), Phase::at_work};
}

}  // namespace

Command make_inspect_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("inspect", "Show a model's shapes and what its cache takes");
  auto flags = std::make_shared<InspectFlags>();
  flags->model.add_to(*command);
  command
      ->add_option("--context", flags->context,
                   "tokens in the cache (default: 8192, or what the model was made for if less)")
      ->type_name("N")
      ->check(whole_number(1, kMaxContext));
  command->add_option("-f,--file", flags->file, "text to run through the model for the key spectrum")
      ->type_name("FILE");
  add_threads_option(*command, flags->threads);
  command->add_flag("--json", flags->json,
                    "print one JSON document on standard output, and nothing else there");
  command->footer(kFooter);
  return {command, [flags] { return inspect(*flags); }};
}

}  // namespace narrows::cli
