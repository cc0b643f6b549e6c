// How tokens are drawn, in the words of OpenAI, llama.cpp and vLLM.
#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <limits>
#include <random>

#include "server/request_parts.h"

namespace narrows::server {

namespace {

constexpr int64_t kMaxSeed = 0xFFFFFFFE;  ///< libllama takes the number above for "draw one"
constexpr int32_t kMaxLastN = 1 << 20;

/// {"id": bias} as OpenAI has it, or [[id, bias]]; false as a bias forbids the token.
void read_logit_bias(Fields& f, int64_t n_vocab, std::vector<LogitBias>& out) {
  const Json* value = f.find("logit_bias");
  if (value == nullptr) return;
  const auto add = [&](int64_t id, const Json& bias) {
    const bool forbidden = bias.is_boolean() && !bias.get<bool>();
    if (id < 0 || id >= n_vocab) {
      f.fail("logit_bias", fmt::format("names token {}, the vocabulary has 0 to {}", id, n_vocab - 1));
    } else if (!forbidden &&
               (!bias.is_number() || !(bias.get<double>() >= -100 && bias.get<double>() <= 100))) {
      f.fail("logit_bias", "must have numbers from -100 to 100");
    } else {
      const float x = forbidden ? -std::numeric_limits<float>::infinity() : bias.get<float>();
      // -100 bans a token, says OpenAI; as a plain addition it need not.
      out.push_back({static_cast<Token>(id), x <= -100 ? -std::numeric_limits<float>::infinity() : x});
    }
  };
  if (value->is_object()) {
    for (const auto& [key, bias] : value->items()) {
      int64_t id = -1;
      const auto [end, code] = std::from_chars(key.data(), key.data() + key.size(), id);
      add(code == std::errc() && end == key.data() + key.size() ? id : -1, bias);
    }
  } else if (value->is_array()) {
    for (const Json& pair : *value) {
      const bool good = pair.is_array() && pair.size() == 2 && pair[0].is_number_integer();
      add(good ? pair[0].get<int64_t>() : -1, good ? pair[1] : Json());
    }
  } else {
    f.fail("logit_bias", fmt::format("must be an object, not {}", kind_of(*value)));
  }
}

void read_penalties(Fields& f, const RequestDefaults& defaults, SamplerOptions& s) {
  const auto real = [&](const char* name, double low, double high, float& out) {
    if (const auto x = f.number(name, low, high)) out = static_cast<float>(*x);
  };
  // As many tokens as the context has: -1.
  const auto all = static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(defaults.n_ctx, 1), kMaxLastN));
  const auto last = [&](const char* name, int32_t& out) {
    const auto n = f.integer(name, -1, kMaxLastN);
    if (n) out = *n < 0 ? all : static_cast<int32_t>(*n);
    return n.has_value();
  };
  real("presence_penalty", -2, 2, s.presence_penalty);
  real("frequency_penalty", -2, 2, s.frequency_penalty);
  real("repeat_penalty", 0.01, 100, s.repeat_penalty);
  const bool has_last = last("repeat_last_n", s.repeat_last_n);
  if (const auto x = f.number("repetition_penalty", 0.01, 100)) {
    if (f.has("repeat_penalty")) f.fail("repetition_penalty", "and repeat_penalty are the same: give one");
    s.repeat_penalty = static_cast<float>(*x);
    if (!has_last) s.repeat_last_n = all;  // vLLM's looks back on everything
  }
  real("dry_multiplier", 0, 100, s.dry_multiplier);
  real("dry_base", 0, 100, s.dry_base);
  if (s.dry_base < 1) s.dry_base = 1.75F;  // as llama.cpp's server
  if (const auto n = f.integer("dry_allowed_length", 0, kMaxLastN))
    s.dry_allowed_length = static_cast<int32_t>(*n);
  (void)last("dry_penalty_last_n", s.dry_last_n);
  if (const auto breakers = f.texts("dry_sequence_breakers", 16, 40)) {
    if (breakers->empty()) f.fail("dry_sequence_breakers", "must not be empty");
    s.dry_breakers = *breakers;
  }
}

}  // namespace

void read_sampling(Fields& f, const RequestDefaults& defaults, GenerationRequest& r) {
  SamplerOptions& s = r.sampling;
  s = defaults.sampling;
  const auto real = [&](const char* name, double low, double high, float& out) {
    if (const auto x = f.number(name, low, high)) out = static_cast<float>(*x);
  };
  const auto whole = [&](const char* name, int64_t low, int64_t high, int32_t& out) {
    if (const auto x = f.integer(name, low, high)) out = static_cast<int32_t>(*x);
  };
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  real("temperature", 0, 100, s.temperature);
  if (s.temperature > 0 && s.temperature < 0.001F) s.temperature = 0;  // no draw would tell them apart
  real("dynatemp_range", 0, 100, s.dynatemp_range);
  real("dynatemp_exponent", 0, 100, s.dynatemp_exponent);
  real("top_p", 0, 1, s.top_p);
  real("min_p", 0, 1, s.min_p);
  for (const char* name : {"typical_p", "typ_p"}) real(name, 0, 1, s.typical_p);
  real("top_n_sigma", -1, 1000, s.top_n_sigma);
  real("xtc_probability", 0, 1, s.xtc_probability);
  real("xtc_threshold", 0, 1, s.xtc_threshold);
  whole("mirostat", 0, 2, s.mirostat);
  real("mirostat_tau", 0, 100, s.mirostat_tau);
  real("mirostat_eta", 0, 1, s.mirostat_eta);
  whole("min_keep", 0, kMaxInt, s.min_keep);
  whole("top_k", -1, kMaxInt, s.top_k);
  s.top_k = std::max(s.top_k, 0);  // -1 is off
  whole("min_tokens", 0, kMaxInt, s.min_tokens);
  read_penalties(f, defaults, s);
  if (const Json* list = f.find("samplers")) {
    if (!list->is_array() || list->size() > 32)
      f.fail("samplers", "must be an array of at most 32 names");
    else
      s.samplers.emplace();
    for (const Json& name : *list) {
      if (!f.ok()) break;
      const std::optional<SamplerStage> stage =
          name.is_string() ? sampler_stage(name.get_ref<const std::string&>()) : std::nullopt;
      if (stage)
        s.samplers->push_back(*stage);
      else
        f.fail("samplers",
               fmt::format("holds {}, which is none of {}", name.is_string() ? name.dump() : kind_of(name),
                           sampler_stage_names()));
    }
  }
  const auto seed = f.integer("seed", -1, std::numeric_limits<int64_t>::max());
  // Larger seeds fold onto 32 bits; -1 and none draw one.
  if (seed || !defaults.has_seed) {
    s.seed = static_cast<uint32_t>(seed && *seed >= 0 ? *seed % (kMaxSeed + 1)
                                                      : std::random_device()() % (kMaxSeed + 1));
  }
  read_logit_bias(f, defaults.n_vocab, s.logit_bias);
}

}  // namespace narrows::server
