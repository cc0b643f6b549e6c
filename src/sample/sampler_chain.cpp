#include "sample/sampler_chain.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string_view>
#include <utility>

#include "text/llama_log.h"
#include "text/tokenizer_impl.h"

namespace narrows {

namespace {

constexpr int32_t kMaxLastN = 1 << 20;  ///< the penalties keep a ring of this many tokens
/// Below, logits of 1e5 divided by the temperature would leave float's range, and the draw would be from NaN.
constexpr double kMinTemperature = 0.001;
constexpr double kMaxTemperature = 100;
constexpr double kMinPenalty = 0.01;
constexpr double kMaxPenalty = 100;
constexpr double kMaxBias = 1e6;
constexpr double kMaxPresence = 100;      ///< of presence and frequency, both ways
constexpr int32_t kMirostatTokens = 100;  ///< that mirostat 1 estimates from, as in its paper
constexpr size_t kMostBreakers = 64;
constexpr size_t kMostStages = 64;

/// The first name of each is ours; the others are llama.cpp's.
constexpr std::pair<std::string_view, SamplerStage> kStages[] = {
    {"penalties", SamplerStage::penalties},
    {"dry", SamplerStage::dry},
    {"top_n_sigma", SamplerStage::top_n_sigma},
    {"top_k", SamplerStage::top_k},
    {"typical_p", SamplerStage::typical_p},
    {"top_p", SamplerStage::top_p},
    {"min_p", SamplerStage::min_p},
    {"xtc", SamplerStage::xtc},
    {"temperature", SamplerStage::temperature},
    {"typ_p", SamplerStage::typical_p},
    {"temp", SamplerStage::temperature},
};
constexpr size_t kOwnNames = 9;

/// NaN is out of every range.
Status check_range(std::string_view name, double value, double low, double high) {
  if (value >= low && value <= high) return {};
  return {StatusCode::invalid_argument,
          fmt::format("{} is {}, which is not from {} to {}", name, value, low, high)};
}

bool repeats_count(const SamplerOptions& o) {
  return o.repeat_last_n > 0 &&
         (o.repeat_penalty != 1.0F || o.presence_penalty != 0.0F || o.frequency_penalty != 0.0F);
}

bool dry_counts(const SamplerOptions& o) {
  return o.dry_multiplier > 0 && o.dry_base >= 1 && o.dry_last_n != 0;
}

void add(const SamplerChain& chain, llama_sampler* sampler) { llama_sampler_chain_add(chain.get(), sampler); }

std::vector<SamplerStage> stages_of(const SamplerOptions& o) {
  if (o.samplers) return *o.samplers;
  std::vector<SamplerStage> all;
  for (size_t i = 0; i < kOwnNames; ++i) all.push_back(kStages[i].second);
  return all;
}

class Maker {
 public:
  Maker(const SamplerOptions& options, const Tokenizer* tokenizer, const SamplerChain& chain)
      : o_(options), tokenizer_(tokenizer), chain_(chain) {}

  void stage(SamplerStage s) {
    const auto keep = static_cast<size_t>(std::max(o_.min_keep, 1));  // a filter never leaves nothing
    switch (s) {
      case SamplerStage::penalties:
        return penalties();
      case SamplerStage::dry:
        return dry();
      case SamplerStage::top_n_sigma:
        if (o_.top_n_sigma > 0) add(chain_, llama_sampler_init_top_n_sigma(o_.top_n_sigma));
        return;
      case SamplerStage::top_k:
        if (o_.top_k > 0) add(chain_, llama_sampler_init_top_k(std::max(o_.top_k, std::max(o_.min_keep, 1))));
        return;
      case SamplerStage::typical_p:
        if (o_.typical_p < 1) add(chain_, llama_sampler_init_typical(o_.typical_p, keep));
        return;
      case SamplerStage::top_p:
        return add(chain_, llama_sampler_init_top_p(o_.top_p, keep));
      case SamplerStage::min_p:
        return add(chain_, llama_sampler_init_min_p(o_.min_p, keep));
      case SamplerStage::xtc:
        if (o_.xtc_probability > 0)
          add(chain_, llama_sampler_init_xtc(o_.xtc_probability, o_.xtc_threshold, keep, o_.seed));
        return;
      case SamplerStage::temperature:
        return temperature();
    }
  }

  void penalties() {
    // The vocabulary's size is asked for the sake of samplers that run in the graph; this chain runs on plain
    // logits.
    constexpr int32_t kVocabNotUsed = 0;
    if (repeats_count(o_))
      add(chain_, llama_sampler_init_penalties(kVocabNotUsed, o_.repeat_last_n, o_.repeat_penalty,
                                               o_.frequency_penalty, o_.presence_penalty));
  }

  void dry() {
    if (!dry_counts(o_)) return;
    std::vector<const char*> breakers;
    for (const std::string& text : o_.dry_breakers) breakers.push_back(text.c_str());
    add(chain_,
        llama_sampler_init_dry(Access::impl(*tokenizer_).vocab, o_.dry_multiplier, o_.dry_base,
                               o_.dry_allowed_length, o_.dry_last_n, breakers.data(), breakers.size()));
  }

  void temperature() {
    if (o_.dynatemp_range > 0) {
      add(chain_, llama_sampler_init_temp_ext(o_.temperature, o_.dynatemp_range, o_.dynatemp_exponent));
    } else {
      add(chain_, llama_sampler_init_temp(o_.temperature));
    }
  }

 private:
  const SamplerOptions& o_;
  const Tokenizer* tokenizer_;
  const SamplerChain& chain_;
};

}  // namespace

std::optional<SamplerStage> sampler_stage(const std::string& name) {
  for (const auto& [known, stage] : kStages) {
    if (name == known) return stage;
  }
  return std::nullopt;
}

std::string sampler_stage_names() {
  std::string names;
  for (size_t i = 0; i < kOwnNames; ++i) names += (i > 0 ? ", " : "") + std::string(kStages[i].first);
  return names;
}

Status check_sampling(const SamplerOptions& o) {
  if (o.temperature != 0.0F) {
    if (Status status = check_range("temperature", o.temperature, kMinTemperature, kMaxTemperature);
        !status.ok()) {
      return {status.code(), status.message() + "; 0 is greedy"};
    }
  }
  constexpr double kInt = std::numeric_limits<int32_t>::max();
  // libllama takes the largest seed for "choose one yourself", and a chosen seed would not be the printed
  // one.
  const Status checks[] = {
      check_range("top-k", o.top_k, 0, kInt),
      check_range("top-p", o.top_p, 0, 1),
      check_range("min-p", o.min_p, 0, 1),
      check_range("typical-p", o.typical_p, 0, 1),
      check_range("top-n-sigma", o.top_n_sigma, -1, 1000),
      check_range("xtc probability", o.xtc_probability, 0, 1),
      check_range("xtc threshold", o.xtc_threshold, 0, 1),
      check_range("dynatemp range", o.dynatemp_range, 0, kMaxTemperature),
      check_range("dynatemp exponent", o.dynatemp_exponent, 0, 100),
      check_range("repeat penalty", o.repeat_penalty, kMinPenalty, kMaxPenalty),
      check_range("presence penalty", o.presence_penalty, -kMaxPresence, kMaxPresence),
      check_range("frequency penalty", o.frequency_penalty, -kMaxPresence, kMaxPresence),
      check_range("repeat last n", o.repeat_last_n, 0, kMaxLastN),
      check_range("dry multiplier", o.dry_multiplier, 0, 100),
      check_range("dry base", o.dry_base, 0, 100),
      check_range("dry allowed length", o.dry_allowed_length, 0, kMaxLastN),
      check_range("dry last n", o.dry_last_n, 0, kMaxLastN),
      check_range("mirostat", o.mirostat, 0, 2),
      check_range("mirostat tau", o.mirostat_tau, 0, 100),
      check_range("mirostat eta", o.mirostat_eta, 0, 1),
      check_range("min keep", o.min_keep, 0, kInt),
      check_range("min tokens", o.min_tokens, 0, kInt),
      check_range("stages of sampling", static_cast<double>(o.samplers ? o.samplers->size() : 0), 0,
                  kMostStages),
      check_range("dry breakers", static_cast<double>(o.dry_breakers.size()), 0, kMostBreakers),
      check_range("seed", o.seed, 0, LLAMA_DEFAULT_SEED - 1),
  };
  for (const Status& status : checks) {
    if (!status.ok()) return status;
  }
  return {};
}

bool has_penalties(const SamplerOptions& options) { return repeats_count(options) || dry_counts(options); }

Result<SamplerChain> make_sampler_chain(const SamplerOptions& o, const Tokenizer* tokenizer) {
  const LlamaAbortGuard guard;
  const int64_t n_vocab = tokenizer != nullptr ? tokenizer->n_vocab() : 0;
  if (tokenizer == nullptr && (o.mirostat == 1 || dry_counts(o)))
    return Status(StatusCode::invalid_argument, "dry and mirostat 1 need the model's tokenizer");
  llama_sampler_chain_params params = llama_sampler_chain_default_params();
  params.no_perf = true;
  SamplerChain chain(llama_sampler_chain_init(params));
  if (!o.logit_bias.empty()) {
    std::vector<llama_logit_bias> biases;
    for (const LogitBias& b : o.logit_bias) {
      if (b.token < 0 || b.token >= n_vocab || std::isnan(b.bias) || b.bias > kMaxBias) {
        return Status(StatusCode::invalid_argument,
                      fmt::format("a bias of {} on token {} is out of range, the vocabulary has {} tokens",
                                  b.bias, b.token, n_vocab));
      }
      biases.push_back({b.token, b.bias});
    }
    add(chain, llama_sampler_init_logit_bias(static_cast<int32_t>(n_vocab),
                                             static_cast<int32_t>(biases.size()), biases.data()));
  }
  Maker make(o, tokenizer, chain);
  if (o.temperature == 0.0F) {
    // Filters would leave the largest anyway.
    for (const SamplerStage stage : stages_of(o))
      if (stage == SamplerStage::penalties || stage == SamplerStage::dry) make.stage(stage);
    add(chain, llama_sampler_init_greedy());
  } else if (o.mirostat > 0) {
    add(chain, llama_sampler_init_temp(o.temperature));
    add(chain, o.mirostat == 1 ? llama_sampler_init_mirostat(static_cast<int32_t>(n_vocab), o.seed,
                                                             o.mirostat_tau, o.mirostat_eta, kMirostatTokens)
                               : llama_sampler_init_mirostat_v2(o.seed, o.mirostat_tau, o.mirostat_eta));
  } else {
    for (const SamplerStage stage : stages_of(o)) make.stage(stage);
    add(chain, llama_sampler_init_dist(o.seed));
  }
  return chain;
}

}  // namespace narrows
