// The chain of libllama's samplers that SamplerOptions ask for.
#pragma once

#include <llama.h>

#include <memory>

#include "narrows/sampling.h"

namespace narrows {

struct SamplerFree {
  void operator()(llama_sampler* chain) const { llama_sampler_free(chain); }
};
using SamplerChain = std::unique_ptr<llama_sampler, SamplerFree>;

/// invalid_argument if a number is out of range: names the option, the value and the range.
Status check_sampling(const SamplerOptions& options);

/// Whether tokens that have come count: repetition penalties or DRY.
bool has_penalties(const SamplerOptions& options);

/// Of options that check_sampling() has found good. The tokenizer may be null where biases, DRY and mirostat
/// 1 are off; invalid_argument else.
Result<SamplerChain> make_sampler_chain(const SamplerOptions& options, const Tokenizer* tokenizer);

}  // namespace narrows
