// All occurrences in one pass, then accepted in libllama's order: the longest token first, each from left to
// right, within what the ones before have left.
#include "text/special_tokens.h"

#include <algorithm>

namespace narrows {
namespace {

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

size_t length_of_character(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0xC0 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

}  // namespace

SpecialTokens::SpecialTokens(const llama_vocab* vocab) {
  constexpr int kControl = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN;
  std::vector<Entry> all;
  for (llama_token id = 0; id < llama_vocab_n_tokens(vocab); ++id) {
    const int attr = llama_vocab_get_attr(vocab, id);
    if ((attr & (kControl | LLAMA_TOKEN_ATTR_USER_DEFINED)) == 0) continue;
    const std::string text = llama_vocab_get_text(vocab, id);
    if (text.empty()) continue;
    all.push_back({text, id, 0, (attr & kControl) != 0, (attr & LLAMA_TOKEN_ATTR_LSTRIP) != 0,
                   (attr & LLAMA_TOKEN_ATTR_RSTRIP) != 0});
  }
  // The same algorithm over the same lengths puts equal ones in the same order.
  std::sort(all.begin(), all.end(),
            [](const Entry& a, const Entry& b) { return a.text.size() > b.text.size(); });
  for (size_t i = 0; i < all.size(); ++i) all[i].order = i;
  std::sort(all.begin(), all.end(), [](const Entry& a, const Entry& b) { return a.text < b.text; });
  entries_ = std::move(all);
  for (size_t byte = 0, at = 0; byte <= 256; ++byte) {
    while (at < entries_.size() && static_cast<unsigned char>(entries_[at].text[0]) < byte) ++at;
    first_[byte] = at;
  }
}

std::vector<SpecialTokens::Found> SpecialTokens::find(std::string_view text) const {
  std::vector<Found> found;
  for (size_t begin = 0; begin < text.size(); ++begin) {
    const auto byte = static_cast<unsigned char>(text[begin]);
    auto low = entries_.begin() + static_cast<std::ptrdiff_t>(first_[byte]);
    auto high = entries_.begin() + static_cast<std::ptrdiff_t>(first_[byte + 1]);
    // Entries in [low, high) agree with the text in their first n bytes; the one that ends there comes first.
    for (size_t n = 1; low != high; ++n) {
      if (low->text.size() == n) found.push_back({begin, &*low++});
      if (begin + n >= text.size()) break;
      const auto next = static_cast<unsigned char>(text[begin + n]);
      low = std::lower_bound(low, high, next, [n](const Entry& e, unsigned char b) {
        return static_cast<unsigned char>(e.text[n]) < b;
      });
      high = std::upper_bound(low, high, next, [n](unsigned char b, const Entry& e) {
        return b < static_cast<unsigned char>(e.text[n]);
      });
    }
  }
  return found;
}

std::vector<size_t> SpecialTokens::breaks_for(std::string_view text) const {
  std::vector<size_t> breaks;
  for (const Found& f : find(text)) {
    if (!f.entry->control) continue;
    // Behind the first character, so that the token is in two pieces; before it, if it is the only one.
    const size_t first = length_of_character(text[f.begin]);
    breaks.push_back(first < f.entry->text.size() ? f.begin + first : f.begin);
  }
  std::sort(breaks.begin(), breaks.end());
  breaks.erase(std::unique(breaks.begin(), breaks.end()), breaks.end());
  return breaks;
}

std::vector<TextPart> SpecialTokens::parts(std::string_view text, bool control,
                                           std::span<const size_t> breaks) const {
  std::vector<Found> found = find(text);
  std::erase_if(found, [&](const Found& f) {
    if (!f.entry->control) return false;
    if (!control) return true;
    const auto inside = std::lower_bound(breaks.begin(), breaks.end(), f.begin);
    return inside != breaks.end() && *inside < f.begin + f.entry->text.size();
  });
  std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
    return a.entry->order != b.entry->order ? a.entry->order < b.entry->order : a.begin < b.begin;
  });

  std::vector<TextPart> tokens;
  std::vector<bool> taken(found.empty() ? 0 : text.size());
  for (const Found& f : found) {
    size_t begin = f.begin;
    size_t end = begin + f.entry->text.size();
    const auto from = taken.begin() + static_cast<std::ptrdiff_t>(begin);
    if (std::find(from, from + static_cast<std::ptrdiff_t>(end - begin), true) !=
        from + static_cast<std::ptrdiff_t>(end - begin))
      continue;
    if (f.entry->strips_left)
      while (begin > 0 && !taken[begin - 1] && is_space(text[begin - 1])) --begin;
    if (f.entry->strips_right)
      while (end < text.size() && !taken[end] && is_space(text[end])) ++end;
    for (size_t at = begin; at < end; ++at) taken[at] = true;
    tokens.push_back({begin, end, f.entry->id});
  }
  std::sort(tokens.begin(), tokens.end(),
            [](const TextPart& a, const TextPart& b) { return a.begin < b.begin; });

  std::vector<TextPart> parts;
  size_t at = 0;
  for (const TextPart& token : tokens) {
    if (token.begin > at) parts.push_back({at, token.begin, LLAMA_TOKEN_NULL});
    parts.push_back(token);
    at = token.end;
  }
  if (at < text.size()) parts.push_back({at, text.size(), LLAMA_TOKEN_NULL});
  return parts;
}

}  // namespace narrows
