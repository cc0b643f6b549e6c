#include "text/byte_tokens.h"

#include <llama-vocab.h>

#include <stdexcept>

namespace narrows {

bool append_byte_tokens(const llama_vocab* vocab, std::string_view text, std::vector<int32_t>& tokens) {
  try {
    for (const char byte : text) {
      const llama_token token = vocab->byte_to_token(static_cast<uint8_t>(byte));
      if (token == LLAMA_TOKEN_NULL) return false;
      tokens.push_back(token);
    }
    return true;
  } catch (const std::out_of_range&) {
    return false;
  }
}

}  // namespace narrows
