// Logits to token id, by libllama's samplers. The seed is always explicit.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "narrows/status.h"
#include "narrows/text.h"

namespace narrows {

/// Added to a token's logit before anything else; -infinity forbids it.
struct LogitBias {
  Token token = 0;
  float bias = 0;
};

/// The steps of a draw, which SamplerOptions::samplers puts in an order.
enum class SamplerStage { penalties, dry, top_n_sigma, top_k, typical_p, top_p, min_p, xtc, temperature };

/// "top_k", and the names that llama.cpp's server has for it; nothing: no such step.
std::optional<SamplerStage> sampler_stage(const std::string& name);
/// "penalties, dry, ...", for messages.
std::string sampler_stage_names();

struct SamplerOptions {
  float temperature = 0.7F;     ///< 0 is greedy; then the filters below have no effect
  int32_t top_k = 40;           ///< 0 is off
  float top_p = 0.95F;          ///< 1 is off
  float min_p = 0.05F;          ///< 0 is off
  float repeat_penalty = 1.0F;  ///< 1 is off
  float presence_penalty = 0;   ///< subtracted once from a token that has come
  float frequency_penalty = 0;  ///< subtracted for each time that it has come
  int32_t repeat_last_n = 64;   ///< tokens that the penalties look back on; 0 is off
  // What follows is as in llama.cpp, which has the papers' names.
  float typical_p = 1.0F;     ///< 1 is off
  float top_n_sigma = -1.0F;  ///< not above 0: off
  float xtc_probability = 0;  ///< 0 is off
  float xtc_threshold = 0.1F;
  float dynatemp_range = 0;  ///< 0 is off
  float dynatemp_exponent = 1.0F;
  float dry_multiplier = 0;  ///< 0 is off
  float dry_base = 1.75F;
  int32_t dry_allowed_length = 2;
  int32_t dry_last_n = 64;  ///< tokens that it looks back on
  std::vector<std::string> dry_breakers = {"\n", ":", "\"", "*"};
  int32_t mirostat = 0;  ///< 1 or 2: instead of all steps but biases and temperature
  float mirostat_tau = 5.0F;
  float mirostat_eta = 0.1F;
  int32_t min_keep = 0;  ///< tokens that no filter takes away
  /// The steps to take, in their order. Nothing: penalties, dry, top_n_sigma, top_k, typical_p, top_p,
  /// min_p, xtc, temperature.
  std::optional<std::vector<SamplerStage>> samplers = {};
  int32_t min_tokens = 0;  ///< of the answer, before which it does not end
  uint32_t seed = 0;
  std::vector<LogitBias> logit_bias = {};
  std::string grammar = {};         ///< GBNF that the answer follows, from its rule `root`; "": free text
  std::string grammar_prefix = {};  ///< what the grammar has before the answer's first byte
  /// Texts and ECMAScript patterns (looked for in the last 256 bytes) of which the first to come begins the
  /// grammar, itself included; what stands before it is free. None of both: it holds from the first byte.
  std::vector<std::string> grammar_words = {};
  std::vector<std::string> grammar_patterns = {};
  /// Between these nothing begins it.
  std::string thinking_begin = {};
  std::vector<std::string> thinking_ends = {};
  bool begins_thinking = false;
};

class Sampler {
 public:
  /// invalid_argument if a number is out of range (names the option, the value and the range), or the grammar
  /// is none. The tokenizer is that of the model, and outlives the sampler; without a grammar or biases it
  /// may be null.
  static Result<std::unique_ptr<Sampler>> create(const SamplerOptions& options,
                                                 const Tokenizer* tokenizer = nullptr);
  ~Sampler();
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  /// logits [n_vocab]. non_finite if any is NaN or +infinity; invalid_argument if the grammar has no token
  /// left to go on with. Does not accept() the token.
  Result<Token> sample(std::span<const float> logits);
  /// The same for callers that draw for several answers at a time: their grammars take the steps that they
  /// need (a nanosecond or two each) from `steps` together. Nothing: those are used up; to be called again,
  /// with the same logits, and goes on from where it was. The token does not depend on that.
  Result<std::optional<Token>> sample(std::span<const float> logits, std::atomic<int64_t>& steps);
  /// Tells the penalties that the token was emitted, and takes the grammar a step further.
  void accept(Token token);
  /// Tells the penalties that the token was in the prompt.
  void accept_prompt(Token token);

 private:
  struct Impl;
  Result<std::optional<Token>> draw(std::span<const float> logits, std::atomic<int64_t>* steps);
  explicit Sampler(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace narrows
