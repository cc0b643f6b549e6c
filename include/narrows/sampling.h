// Logits to token id, by libllama's samplers. The seed is always explicit.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "narrows/status.h"
#include "narrows/text.h"

namespace narrows {

struct SamplerOptions {
  float temperature = 0.7F;     ///< 0 is greedy; then the filters below have no effect
  int32_t top_k = 40;           ///< 0 is off
  float top_p = 0.95F;          ///< 1 is off
  float min_p = 0.05F;          ///< 0 is off
  float repeat_penalty = 1.0F;  ///< 1 is off
  int32_t repeat_last_n = 64;   ///< tokens that the penalty looks back on; 0 is off
  uint32_t seed = 0;
};

class Sampler {
 public:
  /// invalid_argument if a number is out of range (names the option, the value and the range).
  static Result<std::unique_ptr<Sampler>> create(const SamplerOptions& options);
  ~Sampler();
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  /// logits [n_vocab]. non_finite if any is NaN or +infinity. Does not accept() the token.
  Result<Token> sample(std::span<const float> logits);
  /// Tells the penalties that the token was emitted (or was in the prompt).
  void accept(Token token);

 private:
  struct Impl;
  explicit Sampler(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace narrows
