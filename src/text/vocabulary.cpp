#include "text/vocabulary.h"

#include <algorithm>
#include <utility>

#include "text/tokenizer_impl.h"

namespace narrows {

SortedPieces::SortedPieces(const Tokenizer& tokenizer) {
  std::vector<std::pair<std::string, Token>> all;
  for (Token token = 0; token < tokenizer.n_vocab(); ++token) {
    if (tokenizer.is_end(token)) continue;
    std::string piece = tokenizer.piece(token, true);
    if (!piece.empty() && piece[0] != '\0') all.emplace_back(std::move(piece), token);
  }
  std::sort(all.begin(), all.end());
  begin_.push_back(0);
  std::string_view last;
  for (const auto& [piece, token] : all) {
    const auto differ = std::mismatch(piece.begin(), piece.end(), last.begin(), last.end()).first;
    shared_.push_back(static_cast<uint32_t>(differ - piece.begin()));
    tokens_.push_back(token);
    bytes_ += piece;
    begin_.push_back(static_cast<uint32_t>(bytes_.size()));
    last = piece;
  }
}

const SortedPieces& sorted_pieces(const Tokenizer& tokenizer) {
  const auto& impl = Access::impl(tokenizer);
  std::call_once(impl.pieces_once, [&] { impl.pieces = std::make_unique<SortedPieces>(tokenizer); });
  return *impl.pieces;
}

}  // namespace narrows
