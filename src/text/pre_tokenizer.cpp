// Which expression is cut by whom: those for which libllama has a loop of its own by libllama, the rest by
// WordRegex.
#include "text/pre_tokenizer.h"

#include <unicode.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>

#include "text/word_regex.h"

using Words = std::vector<std::string>;
#define NARROWS_SPLIT_SYMBOL \
  "_Z19unicode_regex_splitRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEERKSt6vectorIS4_SaIS4_EEb"
Words library_split(const std::string&, const Words&, bool) __asm__("__real_" NARROWS_SPLIT_SYMBOL);
Words wrapped_split(const std::string&, const Words&, bool) __asm__("__wrap_" NARROWS_SPLIT_SYMBOL);

namespace narrows {
namespace {

/// What libllama's unicode_regex_split_custom() knows. text/pre_tokenizer_test.cpp compares the words of
/// every kind of vocabulary with libllama's, so a list that is out of date shows.
constexpr std::string_view kLibraryHasLoop[] = {
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S))",
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
    R"((?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
    R"((?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
    R"((?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
    R"(\p{Han}+)",
    R"(\p{AFMoE_digits})",
    R"([^\n]+|[\n]+)",
    R"(\d{1,3}(?=(?:\d{3})*\b))",
};
/// Where a number's groups of three begin, counted from its end: no match has a length, and looking ahead
/// from every digit would take the square of their number.
constexpr std::string_view kGroupsOfThree = R"((?=(\d{3})+(?!\d)))";
/// Code points that std::regex may see at once.
constexpr size_t kMostForStdRegex = 4096;

std::atomic<void (*)(const Words&)> g_watcher{nullptr};

bool library_has_loop(const std::string& expression) {
  return std::find(std::begin(kLibraryHasLoop), std::end(kLibraryHasLoop), expression) !=
         std::end(kLibraryHasLoop);
}

/// Null if libllama's std::regex has to do it.
std::shared_ptr<const WordRegex> compiled(const std::string& expression) {
  static std::mutex mutex;
  static std::map<std::string, std::shared_ptr<const WordRegex>> known;  // as many as kinds of vocabularies
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find(expression);
  if (at != known.end()) return at->second;
  return known[expression] = WordRegex::compile(expression);
}

/// True if the expression is matched on categories instead of code points.
bool uses_categories(const std::string& expression) {
  for (const char* name : {"N", "L", "P", "M", "S", "Lu", "Ll", "Lt", "Lm", "Lo"})
    if (expression.find(std::string("\\p{") + name + "}") != std::string::npos) return true;
  return false;
}

uint32_t category_byte(uint32_t code_point) {
  const unicode_cpt_flags flags = unicode_cpt_flags_from_cpt(code_point);
  if (flags.is_whitespace) return 0x0B;
  switch (flags.category_flag()) {
    case unicode_cpt_flags::NUMBER:
      return WordRegex::kNumber;
    case unicode_cpt_flags::LETTER:
      return WordRegex::kLetter;
    case unicode_cpt_flags::PUNCTUATION:
      return WordRegex::kPunctuation;
    case unicode_cpt_flags::ACCENT_MARK:
      return WordRegex::kMark;
    case unicode_cpt_flags::SYMBOL:
      return WordRegex::kSymbol;
    default:
      break;
  }
  return 0xD0;
}

/// What expressions see of a text: code points, white space beyond ASCII as one of ASCII's; or categories.
std::vector<uint32_t> units_of(const std::vector<uint32_t>& code_points, bool categories) {
  std::vector<uint32_t> units = code_points;
  for (uint32_t& unit : units) {
    if (unit < 0x80) continue;
    if (categories) {
      unit = category_byte(unit);
    } else if (unicode_cpt_flags_from_cpt(unit).is_whitespace) {
      unit = 0x0B;
    }
  }
  return units;
}

std::string utf8(std::span<const uint32_t> code_points) {
  std::string text;
  for (const uint32_t c : code_points) text += unicode_cpt_to_utf8(c);
  return text;
}

void split_groups_of_three(std::span<const uint32_t> units, std::vector<size_t>& lengths) {
  const auto is_digit = [](uint32_t u) { return u >= '0' && u <= '9'; };
  size_t digits = 0;  // from here on
  size_t end = units.size();
  const size_t first = lengths.size();
  for (size_t at = units.size(); at-- > 0;) {
    digits = is_digit(units[at]) ? digits + 1 : 0;
    if (digits == 0 || digits % 3 != 0) continue;
    if (end > at) lengths.push_back(end - at);
    end = at;
  }
  if (end > 0) lengths.push_back(end);
  std::reverse(lengths.begin() + static_cast<std::ptrdiff_t>(first), lengths.end());
}

}  // namespace

void watch_expressions(void (*watcher)(const std::vector<std::string>&)) { g_watcher = watcher; }

std::vector<std::string> library_split_words(const std::string& text,
                                             const std::vector<std::string>& expressions, bool byte_encode) {
  return library_split(text, expressions, byte_encode);
}

std::vector<std::string> split_words(const std::string& text, const std::vector<std::string>& expressions,
                                     bool byte_encode) {
  if (text.empty()) return {};
  if (std::all_of(expressions.begin(), expressions.end(), library_has_loop))
    return library_split(text, expressions, byte_encode);

  const std::vector<uint32_t> code_points = unicode_cpts_from_utf8(text);
  const std::span<const uint32_t> all(code_points);
  std::vector<size_t> lengths{code_points.size()};
  for (const std::string& expression : expressions) {
    const bool by_library = library_has_loop(expression);
    const std::shared_ptr<const WordRegex> regex = by_library ? nullptr : compiled(expression);
    std::vector<uint32_t> units;
    if (!by_library) units = units_of(code_points, uses_categories(expression));
    std::vector<size_t> parts;
    size_t begin = 0;
    for (const size_t length : lengths) {
      const auto seen =
          std::span<const uint32_t>(units).subspan(by_library ? 0 : begin, by_library ? 0 : length);
      if (!by_library && expression == kGroupsOfThree) {
        split_groups_of_three(seen, parts);
      } else if (regex != nullptr) {
        regex->split(seen, parts);
      } else {
        // What neither of us has a loop for (another llama.cpp than the pinned one) must not run long.
        const size_t most = by_library ? length : kMostForStdRegex;
        for (size_t at = begin; at < begin + length; at += most) {
          const size_t n = std::min(most, begin + length - at);
          for (const std::string& word : library_split(utf8(all.subspan(at, n)), {expression}, false))
            parts.push_back(unicode_cpts_from_utf8(word).size());
        }
      }
      begin += length;
    }
    lengths = std::move(parts);
  }

  std::vector<std::string> words;
  words.reserve(lengths.size());
  size_t begin = 0;
  for (const size_t length : lengths) {
    std::string word = utf8(all.subspan(begin, length));
    begin += length;
    if (byte_encode) {
      std::string encoded;
      for (const char byte : word) encoded += unicode_byte_to_utf8(static_cast<uint8_t>(byte));
      word = std::move(encoded);
    }
    words.push_back(std::move(word));
  }
  return words;
}

}  // namespace narrows

Words wrapped_split(const std::string& text, const Words& expressions, bool byte_encode) {
  if (auto* watcher = narrows::g_watcher.load()) watcher(expressions);
  return narrows::split_words(text, expressions, byte_encode);
}
