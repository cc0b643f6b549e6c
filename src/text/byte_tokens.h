// Text as a vocabulary writes it byte by byte.
#pragma once

#include <string_view>
#include <vector>

struct llama_vocab;

namespace narrows {

/// Appends a token for each byte of `text`; false if the vocabulary has none for one of them.
bool append_byte_tokens(const llama_vocab* vocab, std::string_view text, std::vector<int32_t>& tokens);

}  // namespace narrows
