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

struct SamplerOptions {
  float temperature = 0.7F;     ///< 0 is greedy; then the filters below have no effect
  int32_t top_k = 40;           ///< 0 is off
  float top_p = 0.95F;          ///< 1 is off
  float min_p = 0.05F;          ///< 0 is off
  float repeat_penalty = 1.0F;  ///< 1 is off
  float presence_penalty = 0;   ///< subtracted once from a token that has come
  float frequency_penalty = 0;  ///< subtracted for each time that it has come
  int32_t repeat_last_n = 64;   ///< tokens that the penalties look back on; 0 is off
  uint32_t seed = 0;
  std::vector<LogitBias> logit_bias = {};
  std::string grammar = {};  ///< GBNF that the answer follows, from its rule `root`; "": free text
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
