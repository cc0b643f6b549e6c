// Registration of the shared flags on CLI11. Ranges that the library checks itself are not repeated here.
#include "cli/engine_flags.h"

#include <fmt/format.h>

#include <charconv>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "base/file.h"
#include "base/utf8.h"
#include "cli/output.h"
#include "device/library.h"
#include "peer/llama_peer.h"

namespace narrows::cli {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{256} << 20;  ///< about 60 million tokens: above any context
constexpr int64_t kMaxContext = 1'000'000'000;
constexpr int kMaxThreads = 4096;
constexpr int64_t kMegabyte = 1'000'000, kMaxMegabytes = 1'000'000'000;
constexpr uint32_t kMaxSeed = 0xFFFFFFFE;  ///< libllama takes the number above for "random"

}  // namespace

void ModelFlags::add_to(CLI::App& app) {
  app.add_option("-m,--model", path, "GGUF file of the model; of a split one any part")
      ->required()
      ->type_name("FILE");
  app.add_option(
         "--memory-mb", memory_mb,
         "most memory (MB) of weights, caches and what prompts and steps work in; what does not fit is "
         "refused before it begins (default: what the system has free)")
      ->type_name("N")
      ->check(whole_number(1, kMaxMegabytes));
  using Scaling = RopeOverrides::Scaling;
  static const std::map<std::string, Scaling> scalings = {
      {"none", Scaling::none}, {"linear", Scaling::linear}, {"yarn", Scaling::yarn}};
  app.add_option("--rope-scaling", rope.scaling,
                 "none, linear or yarn (this and the next: default as the file says)")
      ->type_name("KIND")
      ->transform(CLI::CheckedTransformer(scalings).description(""));
  CLI::Option* scale = app.add_option_function<double>(
                              "--rope-scale", [this](double factor) { rope.freq_scale = 1 / factor; },
                              "the context grows by this factor: 1 / --rope-freq-scale")
                           ->type_name("X")
                           ->check(CLI::Range(1e-6, 1e6));
  app.add_option("--rope-freq-base", rope.freq_base, "base of RoPE's frequencies")
      ->type_name("X")
      ->check(CLI::Range(1e-3, 1e15));
  app.add_option("--rope-freq-scale", rope.freq_scale, "factor on RoPE's frequencies")
      ->type_name("X")
      ->check(CLI::Range(1e-6, 1e6))
      ->excludes(scale);
  app.add_option("--yarn-orig-ctx", rope.yarn_orig_ctx, "YaRN: context that the model was trained with")
      ->type_name("N")
      ->check(whole_number(1, kMaxContext));
  app.add_option("--yarn-ext-factor", rope.yarn_ext_factor,
                 "YaRN: share of extrapolation; 0: interpolates alone")
      ->type_name("X")
      ->check(CLI::Range(0.0, 1e3));
  app.add_option("--yarn-attn-factor", rope.yarn_attn_factor, "YaRN: factor on queries and keys")
      ->type_name("X")
      ->check(CLI::Range(1e-6, 1e6));
  app.add_option("--yarn-beta-slow", rope.yarn_beta_slow, "YaRN: waves of fewer turns are interpolated")
      ->type_name("X")
      ->check(CLI::Range(0.0, 1e6));
  app.add_option("--yarn-beta-fast", rope.yarn_beta_fast, "YaRN: waves of more turns are left as they are")
      ->type_name("X")
      ->check(CLI::Range(0.0, 1e6));
}

void ModelFlags::add_device_to(CLI::App& app) {
  const auto check = [](const std::string& text) { return device::parse_choice(text).status().message(); };
  app.add_option("--device", device,
                 "where it is computed: cpu, cuda or cuda:N (a GPU; needs libnarrows_cuda.so beside the "
                 "program), auto (a GPU if that can be)")
      ->type_name("WHERE")
      ->capture_default_str()
      ->check(CLI::Validator(check, ""));
}

void ModelFlags::add_template_to(CLI::App& app) {
  CLI::Option* source = app.add_option("--chat-template", template_source,
                                       "chat template in place of the file's: Jinja, or chatml")
                            ->type_name("TEXT");
  app.add_option("--chat-template-file", template_file, "the same from a file")
      ->type_name("FILE")
      ->excludes(source);
  app.add_option("--chat-template-kwargs", template_arguments,
                 R"(what the template reads beside the messages: {"enable_thinking": false}, say)")
      ->type_name("JSON");
}

Result<ChatTemplateOptions> ModelFlags::chat_template() const {
  ChatTemplateOptions options{template_source, {}};
  if (!template_file.empty()) {
    Result<std::string> text = read_text_file(template_file);
    if (!text.ok()) return text.status();
    if (text->empty())
      return Status(StatusCode::invalid_argument,
                    fmt::format("{} is empty, it should hold a chat template", quote(template_file)));
    options.source = std::move(*text);
  }
  if (template_arguments.empty()) return options;
  const auto fields = nlohmann::json::parse(template_arguments, nullptr, false);
  if (!fields.is_object()) {
    return Status(
        StatusCode::invalid_argument,
        fmt::format("--chat-template-kwargs must be a JSON object, not {}", quote(template_arguments)));
  }
  for (const auto& [name, value] : fields.items()) options.arguments[name] = value.dump();
  return options;
}

Result<std::shared_ptr<const Model>> ModelFlags::load(
    LoadOptions options, const std::function<void(const std::string&)>& warn) const {
  set_memory_limit(memory_mb.value_or(0) * kMegabyte);
  Result<ChatTemplateOptions> chat = chat_template();
  if (!chat.ok()) return chat.status();
  options.rope = rope;
  options.device = device;
  options.chat_template = std::move(*chat);
  Result<std::shared_ptr<const Model>> model = Model::load(path, options);
  if (!model.ok()) return model;
  if (!(*model)->info().device.empty() && !warn) note("[on " + (*model)->info().device + "]");
  for (const std::string& warning : (*model)->info().warnings) {
    if (warn) {
      warn(warning);
    } else {
      note("[warning: " + warning + "]");
    }
  }
  return model;
}

CLI::Validator whole_number(int64_t low, int64_t high) {
  return CLI::Validator(
      [low, high](const std::string& text) {
        int64_t number = 0;
        const char* end = text.data() + text.size();
        const auto [stop, error] = std::from_chars(text.data(), end, number);
        const bool good = error == std::errc() && stop == end && number >= low && number <= high;
        return good ? std::string()
                    : fmt::format("must be a whole number from {} to {}, not {}", low, high, quote(text));
      },
      "");
}

CLI::Validator peer_cache() {
  return CLI::Validator([](const std::string& text) { return LlamaPeer::check_kv(text).message(); }, "");
}

std::string profile_help() {
  return fmt::format("how the key/value cache is kept: {}; with keys such as klt:k=2,v=3,budget=1024",
                     fmt::join(KvProfile::names(), ", "));
}

void add_threads_option(CLI::App& app, std::optional<int>& threads) {
  app.add_option("--threads", threads, "threads (default: one a core that it may use)")
      ->type_name("N")
      ->check(whole_number(1, kMaxThreads));
}

void add_prompt_options(CLI::App& app, PromptOptions& options) {
  static const std::map<std::string, PrefillProducts> products = {
      {"auto", PrefillProducts::automatic}, {"int8", PrefillProducts::int8}, {"bf16", PrefillProducts::bf16}};
  app.add_option(
         "--products", options.products,
         "how a prompt is multiplied by the weights: auto, int8 or bf16 (default: auto, which is bf16 "
         "where the CPU has it)")
      ->type_name("NAME")
      ->transform(CLI::CheckedTransformer(products).description(""));
  const auto attention = [](const std::string& name) { return parse_attention(name).status().message(); };
  app.add_option_function<std::string>(
         "--attention", [&options](const std::string& name) { options.attention = *parse_attention(name); },
         fmt::format("in which precision a prompt attends: {} (default: auto, which is bf16-shift where the "
                     "CPU multiplies bfloat16, else f32)",
                     fmt::join(attention_names(), ", ")))
      ->type_name("NAME")
      ->check(CLI::Validator(attention, ""));
  const auto prefill = [](const std::string& text) { return parse_prefill(text).status().message(); };
  app.add_option_function<std::string>(
         "--prefill", [&options](const std::string& text) { options.mass = *parse_prefill(text); },
         "which keys a prompt's tokens attend to: dense (all, default), or sparse, which leaves out those "
         "that get little of the attention: faster on long prompts, not exact; sparse:mass=X keeps at least "
         "that share")
      ->type_name("WHICH")
      ->check(CLI::Validator(prefill, ""));
}

void SessionFlags::add_to(CLI::App& app) {
  app.add_option("--kv", kv, profile_help())->type_name("PROFILE")->capture_default_str();
  app.add_option("--basis", basis,
                 "calibration file for the profile; without it the prompt calibrates its own cache")
      ->type_name("FILE");
  app.add_option("--ctx", n_ctx, "most tokens the cache may hold (default: what the model was made for)")
      ->type_name("N")
      ->check(whole_number(1, kMaxContext));
  add_threads_option(app, threads);
  add_prompt_options(app, prompt);
}

Result<SessionOptions> SessionFlags::parse() const {
  Result<KvProfile> profile = KvProfile::parse(kv);
  if (!profile.ok()) return profile.status();
  SessionOptions options;
  options.kv = *profile;
  options.basis_path = basis;
  options.n_ctx = n_ctx.value_or(0);
  options.n_threads = threads.value_or(0);
  options.prompt = prompt;
  return options;
}

void SamplerFlags::add_to(CLI::App& app) {
  app.add_option("--temp", options.temperature, "temperature; 0 always takes the likeliest token")
      ->type_name("T")
      ->capture_default_str();
  app.add_flag("--greedy", greedy, "the same as --temp 0");
  app.add_option("--top-k", options.top_k, "draw from the K likeliest tokens; 0: from all")
      ->type_name("K")
      ->check(whole_number(0, std::numeric_limits<int32_t>::max()))
      ->capture_default_str();
  app.add_option("--top-p", options.top_p,
                 "draw from the likeliest tokens that make up this probability; 1: off")
      ->type_name("P")
      ->capture_default_str();
  app.add_option("--min-p", options.min_p, "drop tokens less likely than this times the likeliest; 0: off")
      ->type_name("P")
      ->capture_default_str();
  app.add_option("--repeat-penalty", options.repeat_penalty,
                 "divide the scores of the last 64 tokens by this, also with --temp 0; 1: off")
      ->type_name("X")
      ->capture_default_str();
  app.add_option("--seed", seed, "seed of the draw (default: random; the summary prints it)")
      ->type_name("S")
      ->check(whole_number(0, kMaxSeed));
}

SamplerOptions SamplerFlags::resolve() const {
  SamplerOptions resolved = options;
  if (greedy) resolved.temperature = 0.0F;
  resolved.seed = seed ? *seed : static_cast<uint32_t>(std::random_device()() % (kMaxSeed + 1));
  return resolved;
}

Result<std::string> read_text_file(const std::string& path) {
  Result<std::string> text = read_file(path, kMaxFileBytes);
  if (!text.ok()) return text;
  if (const size_t bad = find_invalid_utf8(*text); bad != std::string::npos) {
    return {StatusCode::invalid_file,
            fmt::format("{} is not valid UTF-8 at byte {}; convert it to UTF-8 first", quote(path), bad)};
  }
  drop_byte_order_mark(*text);
  return text;
}

std::string join_parts(const std::vector<std::string>& parts) {
  std::string joined;
  for (const std::string& part : parts) {
    if (part.empty()) continue;
    if (!joined.empty()) {
      joined.erase(joined.find_last_not_of("\r\n") + 1);
      joined += "\n\n";
    }
    joined += part;
  }
  return joined;
}

}  // namespace narrows::cli
