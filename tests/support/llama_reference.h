// libllama's logits as the reference of our own, after every token of a sequence at once.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "narrows/text.h"

namespace narrows::testing {

/// [n, n_vocab]
struct LogitRows {
  int64_t n_vocab = 0;
  std::vector<float> data;

  std::span<const float> row(int64_t i) const {
    return std::span(data).subspan(static_cast<size_t>(i * n_vocab), static_cast<size_t>(n_vocab));
  }
};

enum class LlamaWay {
  exact,      ///< float32 cache, attention without fused kernels: nothing is rounded but float32 itself
  f16_plain,  ///< f16 cache, attention without fused kernels
  f16_flash,  ///< f16 cache, flash attention: how its users run it, and src/peer
};

/// How libllama makes one vector of a text, of the hidden states after the last norm; not normalised.
enum class LlamaPooling { mean, last };
/// [n_embd], computed as LlamaWay::exact.
std::vector<float> llama_embedding(const std::string& gguf_path, std::span<const Token> tokens,
                                   LlamaPooling pooling);

/// Rows after tokens 0, 1, ...; ends the test program with the reason if libllama refuses the file.
LogitRows llama_logits(const std::string& gguf_path, std::span<const Token> tokens, LlamaWay way);

}  // namespace narrows::testing
