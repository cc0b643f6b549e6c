#include "sample/grammar_trigger.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>

#include "base/utf8.h"

namespace narrows {

namespace {

/// Patterns are looked for in so many bytes: the library's matcher recurses along them.
constexpr size_t kMostPatternBytes = 256;

/// The first place of any of the words; npos if there is none.
size_t first_of(const std::string& text, const std::vector<std::string>& words, size_t* length = nullptr) {
  size_t first = std::string::npos;
  for (const std::string& word : words) {
    const size_t at = text.find(word);
    if (at >= first) continue;
    first = at;
    if (length != nullptr) *length = word.size();
  }
  return first;
}

}  // namespace

Result<GrammarTrigger> GrammarTrigger::create(const SamplerOptions& options) {
  GrammarTrigger t;
  t.words_ = options.grammar_words;
  t.thinking_begin_ = options.thinking_begin;
  t.thinking_ends_ = options.thinking_ends;
  t.thinking_ = options.begins_thinking && !options.thinking_ends.empty();
  t.n_kept_ = options.thinking_begin.size();
  for (const auto* list : {&t.words_, &t.thinking_ends_})
    for (const std::string& word : *list) t.n_kept_ = std::max(t.n_kept_, word.size());
  for (const std::string& pattern : options.grammar_patterns) {
    try {
      const bool from_start = !pattern.empty() && pattern[0] == '^';
      (from_start ? t.patterns_from_start_ : t.patterns_).emplace_back(pattern);
      t.n_kept_ = std::max(t.n_kept_, kMostPatternBytes);
    } catch (const std::regex_error&) {
      return Status(StatusCode::invalid_argument,
                    fmt::format("{} is no pattern that can begin a grammar", quote(pattern)));
    }
  }
  return t;
}

/// Where the grammar begins in kept_.
std::optional<size_t> GrammarTrigger::find_begin() const {
  size_t first = first_of(kept_, words_);
  const auto look = [&](const std::regex& pattern) {
    std::smatch match;
    if (kept_.size() > 2 * kMostPatternBytes || !std::regex_search(kept_, match, pattern)) return;
    // What a group holds, if one does, is where the grammar begins.
    size_t at = static_cast<size_t>(match.position(0));
    for (size_t group = 1; group < match.size(); ++group) {
      if (!match[group].matched || match[group].length() == 0) continue;
      at = static_cast<size_t>(match.position(group));
      break;
    }
    first = std::min(first, at);
  };
  for (const std::regex& pattern : patterns_) look(pattern);
  if (is_start_)
    for (const std::regex& pattern : patterns_from_start_) look(pattern);
  return first == std::string::npos ? std::nullopt : std::optional(first);
}

/// While the model thinks: true once it has come to the end, and kept_ is what follows.
bool GrammarTrigger::follow_thinking() {
  size_t length = 0;
  const size_t end = first_of(kept_, thinking_ends_, &length);
  if (end == std::string::npos) return false;
  thinking_ = false;
  // A word that begins the grammar may end the thinking as well.
  const bool begins = std::find(words_.begin(), words_.end(), kept_.substr(end, length)) != words_.end();
  kept_.erase(0, begins ? end : end + length);
  is_start_ = false;
  return true;
}

std::optional<std::string> GrammarTrigger::push(std::string_view piece) {
  kept_ += piece;
  while (true) {
    if (thinking_ && !follow_thinking()) break;
    const std::optional<size_t> begin = find_begin();
    const size_t thought =
        thinking_begin_.empty() || thinking_ends_.empty() ? std::string::npos : kept_.find(thinking_begin_);
    if (begin && *begin <= thought) {
      std::string held = kept_.substr(*begin);
      kept_.clear();
      is_start_ = false;
      return held;
    }
    if (thought == std::string::npos) break;
    thinking_ = true;
    kept_.erase(0, thought + thinking_begin_.size());
    is_start_ = false;
  }
  if (kept_.size() > n_kept_) {
    kept_.erase(0, kept_.size() - n_kept_);
    is_start_ = false;
  }
  return std::nullopt;
}

}  // namespace narrows
