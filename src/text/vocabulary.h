// What stands behind a Tokenizer, for what is done with the vocabulary beside tokenizing: grammars.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "narrows/text.h"

namespace narrows {

/// The pieces of all tokens, control tokens as text, in the order of their bytes: one walk over it reads what
/// pieces have in common once. Without ends of the answer, empty pieces and those that begin with a zero
/// byte.
class SortedPieces {
 public:
  explicit SortedPieces(const Tokenizer& tokenizer);
  size_t size() const { return tokens_.size(); }
  Token token(size_t i) const { return tokens_[i]; }
  std::string_view piece(size_t i) const {
    return std::string_view(bytes_).substr(begin_[i], begin_[i + 1] - begin_[i]);
  }
  /// Bytes that piece i begins with as piece i - 1 does.
  size_t shared(size_t i) const { return shared_[i]; }

 private:
  std::vector<Token> tokens_;
  std::string bytes_;
  std::vector<uint32_t> begin_;
  std::vector<uint32_t> shared_;
};

/// Made at the first call; lives as long as the tokenizer. Throws std::bad_alloc.
const SortedPieces& sorted_pieces(const Tokenizer& tokenizer);

}  // namespace narrows
