// Where a text names tokens by their own text ("<|im_end|>"), as libllama's tokenizer finds them, but in time
// that does not grow with the square of their number, and with a say in which of them count.
#pragma once

#include <llama.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace narrows {

/// A part of a text: a token that it names, or text to be cut into tokens.
struct TextPart {
  size_t begin = 0;
  size_t end = 0;
  llama_token token = LLAMA_TOKEN_NULL;  ///< LLAMA_TOKEN_NULL: text
};

class SpecialTokens {
 public:
  SpecialTokens() = default;
  explicit SpecialTokens(const llama_vocab* vocab);

  /// The parts of `text` in their order; spaces that a token swallows are in none. Control tokens count if
  /// `control` is set and no break lies in them: breaks are sorted byte offsets b, and b lies in a token at
  /// [begin, end) if begin <= b < end. Tokens that a file's maker defined for texts always count. Throws
  /// std::bad_alloc.
  std::vector<TextPart> parts(std::string_view text, bool control, std::span<const size_t> breaks) const;

  /// For each control token that `text` names, overlapping ones too: an offset that lies in it and in no
  /// other that it does not overlap. Sorted.
  std::vector<size_t> breaks_for(std::string_view text) const;

 private:
  struct Entry {
    std::string text;
    llama_token id;
    size_t order;  ///< the longest first, as libllama sorts them
    bool control;  ///< or the one for what is unknown
    bool strips_left;
    bool strips_right;
  };
  struct Found {
    size_t begin;
    const Entry* entry;
  };
  std::vector<Found> find(std::string_view text) const;

  std::vector<Entry> entries_;  ///< sorted by text
  size_t first_[257] = {};      ///< entries that begin with byte b: first_[b] to first_[b + 1]
};

}  // namespace narrows
