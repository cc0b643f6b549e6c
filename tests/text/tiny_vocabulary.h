// A GGUF file with a byte-level vocabulary and no weights, for tests that need no model: whole and right, or
// with one thing wrong.
#pragma once

#include <gguf.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace narrows::testing {

struct TinyVocabulary {
  std::string chat_template;       ///< empty: none
  bool word_twice = false;         ///< libllama asserts that there is none
  bool wants_unknown_bos = false;  ///< asks for a BOS token that it does not have: asserted at each use
  bool no_tokens = false;
  std::string tokenizer = "gpt2";  ///< "none": a file without a vocabulary
  std::string pre = "gpt-2";       ///< how texts are cut into words
  bool add_eos = false;            ///< asks for the end token behind a text
  bool add_bos = false;            ///< asks for a token before it: the end token too
  std::string name;                ///< general.name; with "phi-3" control tokens swallow spaces behind them
  /// More tokens, from 258 on, with their types (1 normal, 3 control, 4 defined by the user).
  std::vector<std::pair<std::string, int32_t>> more;

  bool write(const std::string& path) const;
};

/// The character by which byte-level vocabularies write a byte (GPT-2's table).
inline std::string gpt2_character(int byte) {
  const auto printable = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
  int code = byte;
  if (!printable(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += printable(b) ? 0 : 1;
  }
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3F))};
}

inline bool TinyVocabulary::write(const std::string& path) const {
  gguf_context* file = gguf_init_empty();
  gguf_set_val_str(file, "general.architecture", "llama");
  gguf_set_val_str(file, "tokenizer.ggml.model", tokenizer.c_str());
  gguf_set_val_str(file, "tokenizer.ggml.pre", pre.c_str());
  // 0..255 the bytes, 256 the end, 257 one merged pair.
  std::vector<std::string> words;
  for (int byte = 0; byte < 256; ++byte) words.push_back(gpt2_character(byte));
  words.insert(words.end(), {"<|im_end|>", "he"});
  if (word_twice) words.back() = "h";
  std::vector<int32_t> types(words.size(), 1);
  types[256] = 3;  // control
  for (const auto& [word, type] : more) {
    words.push_back(word);
    types.push_back(type);
  }
  if (!name.empty()) gguf_set_val_str(file, "general.name", name.c_str());
  if (add_bos) {
    gguf_set_val_bool(file, "tokenizer.ggml.add_bos_token", true);
    gguf_set_val_u32(file, "tokenizer.ggml.bos_token_id", 256);
  }
  if (add_eos) gguf_set_val_bool(file, "tokenizer.ggml.add_eos_token", true);
  if (wants_unknown_bos) {
    gguf_set_val_bool(file, "tokenizer.ggml.add_bos_token", true);
    words.resize(10);  // libllama's own guess for this tokenizer is 11
    types.resize(10);
    words[0] = gpt2_character('!');
  }
  std::vector<const char*> pointers;
  for (const std::string& word : words) pointers.push_back(word.c_str());
  const char* merge = "h e";
  if (!no_tokens) gguf_set_arr_str(file, "tokenizer.ggml.tokens", pointers.data(), pointers.size());
  gguf_set_arr_data(file, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, types.data(), types.size());
  gguf_set_arr_str(file, "tokenizer.ggml.merges", &merge, 1);
  gguf_set_val_u32(file, "tokenizer.ggml.eos_token_id", 256);
  if (!chat_template.empty()) gguf_set_val_str(file, "tokenizer.chat_template", chat_template.c_str());
  const bool written = gguf_write_to_file(file, path.c_str(), true);
  gguf_free(file);
  return written;
}

}  // namespace narrows::testing
