// A parser of regular expressions that writes down at once what it has read, but for the two ends of the
// whole: those of each alternative are anchored, or open to any text.
#include "sample/schema_pattern.h"

#include <fmt/format.h>
#include <unicode.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "base/utf8.h"

namespace narrows {

namespace {

constexpr size_t kMaxPattern = 10'000;  ///< bytes
constexpr size_t kMaxPlain = 200'000;
constexpr int kMaxDepth = 50;  ///< groups in groups; the converter ends at 100
constexpr int64_t kMaxCount = 100'000;

constexpr uint32_t kLast = 0x10FFFF;

/// Ascending ranges of code points, both ends included, that do not touch.
class CharSet {
 public:
  CharSet() = default;
  CharSet(std::initializer_list<std::pair<uint32_t, uint32_t>> ranges) {
    for (const auto& [first, last] : ranges) add(first, last);
  }
  void add(uint32_t first, uint32_t last) {
    ranges_.emplace_back(first, last);
    std::sort(ranges_.begin(), ranges_.end());
    std::vector<std::pair<uint32_t, uint32_t>> merged;
    for (const auto& r : ranges_) {
      if (!merged.empty() && r.first <= merged.back().second + 1) {
        merged.back().second = std::max(merged.back().second, r.second);
      } else {
        merged.push_back(r);
      }
    }
    ranges_ = std::move(merged);
  }
  void add(const CharSet& other) {
    for (const auto& [first, last] : other.ranges_) add(first, last);
  }
  CharSet inverse() const {
    CharSet out;
    uint32_t next = 0;
    for (const auto& [first, last] : ranges_) {
      if (first > next) out.ranges_.emplace_back(next, first - 1);
      next = last + 1;
    }
    if (next <= kLast) out.ranges_.emplace_back(next, kLast);
    return out;
  }
  CharSet without(const CharSet& other) const {
    CharSet both = inverse();
    both.add(other);
    return both.inverse();
  }
  bool has(uint32_t c) const {
    return std::any_of(ranges_.begin(), ranges_.end(),
                       [c](const auto& r) { return r.first <= c && c <= r.second; });
  }
  const std::vector<std::pair<uint32_t, uint32_t>>& ranges() const { return ranges_; }

 private:
  std::vector<std::pair<uint32_t, uint32_t>> ranges_;
};

const CharSet& digits() {
  static const CharSet set{{'0', '9'}};
  return set;
}
const CharSet& word_characters() {
  static const CharSet set{{'0', '9'}, {'A', 'Z'}, {'a', 'z'}, {'_', '_'}};
  return set;
}
const CharSet& spaces() {
  static const CharSet set{{9, 13},          {32, 32},         {0xA0, 0xA0},     {0x1680, 0x1680},
                           {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F},
                           {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
  return set;
}
const CharSet& line_ends() {
  static const CharSet set{{10, 10}, {13, 13}, {0x2028, 0x2029}};
  return set;
}
/// What JSON writes as an escape, and surrogates, which no text has.
const CharSet& escaped() {
  static const CharSet set{{0, 31}, {'"', '"'}, {'\\', '\\'}, {0xD800, 0xDFFF}};
  return set;
}

/// The letter of a control character's short escape, or 0.
char short_escape(uint32_t c) {
  constexpr std::string_view kControls = "\b\f\n\r\t", kLetters = "bfnrt";
  const size_t at = c < 32 ? kControls.find(static_cast<char>(c)) : std::string_view::npos;
  return at == std::string_view::npos ? '\0' : kLetters[at];
}

/// Means itself in the converter's classes, and outside of them.
bool is_plain(uint32_t c) {
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
         (c < 0x80 && c != 0 &&
          std::string_view(" _:/,@#%&=!~'<>;").find(static_cast<char>(c)) != std::string_view::npos);
}

/// One character of JSON's text in a class of the converter's.
void put(uint32_t c, std::string& out) {
  if (is_plain(c)) {
    out += static_cast<char>(c);
  } else {
    out += c < 0x10000 ? fmt::format("\\u{:04X}", c) : fmt::format("\\U{:08X}", c);
  }
}

/// The set as JSON's text writes a character of it; nothing if it has none that can be written.
std::optional<std::string> written(const CharSet& set) {
  const auto& ranges = set.ranges();
  if (ranges.size() == 1 && ranges[0].first == ranges[0].second && is_plain(ranges[0].first))
    return std::string(1, static_cast<char>(ranges[0].first));
  std::vector<std::string> ways;
  std::string raw;
  const CharSet as_itself = set.without(escaped());
  for (const auto& [first, last] : as_itself.ranges()) {
    put(first, raw);
    if (last == first) continue;
    raw += '-';
    put(last, raw);
  }
  if (!raw.empty()) ways.push_back("[" + raw + "]");
  std::string after_backslash;
  for (const uint32_t c : {uint32_t{'"'}, uint32_t{'\\'}}) {
    if (set.has(c)) put(c, after_backslash);
  }
  for (uint32_t c = 0; c < 32; ++c) {
    if (const char letter = short_escape(c); letter != '\0' && set.has(c)) after_backslash += letter;
  }
  if (!after_backslash.empty()) ways.push_back("[\\u005C][" + after_backslash + "]");
  if (ways.empty()) {
    for (uint32_t c = 0; c < 32; ++c) {
      if (set.has(c))
        ways.push_back(fmt::format("[\\u005C][u][0][0][{}][{}]", c / 16, "0123456789abcdef"[c % 16]));
    }
  }
  if (ways.empty()) return std::nullopt;
  return ways.size() == 1 && after_backslash.empty() && !raw.empty()
             ? ways[0]
             : fmt::format("({})", fmt::join(ways, "|"));
}

/// What of the text an alternative is anchored to.
struct Alternative {
  std::string body;
  bool from_start = false, to_end = false;
};

class Pattern {
 public:
  explicit Pattern(const std::string& text) : pattern_(text) {}

  Result<std::string> plain() {
    if (pattern_.size() > kMaxPattern) return refused(fmt::format("is longer than {} bytes", kMaxPattern));
    if (find_invalid_utf8(pattern_) != std::string::npos) return refused("is no UTF-8");
    for (size_t at = 0; at < pattern_.size();) {
      const utf8_parse_result next = common_parse_utf8_codepoint(pattern_, at);
      text_.push_back(next.codepoint);
      at += next.bytes_consumed;
    }
    std::vector<Alternative> all;
    if (!alternatives(0, all)) return status_;
    if (at_ < text_.size()) return refused("is no regular expression, a ) has no (");
    const std::string any = *written(CharSet{{0, kLast}}) + "*";
    std::string out = all.size() > 1 ? "^(" : "^";
    for (size_t i = 0; i < all.size(); ++i) {
      if (i > 0) out += '|';
      if (!all[i].from_start) out += any;
      out += all[i].body;
      if (!all[i].to_end) out += any;
    }
    return out + (all.size() > 1 ? ")$" : "$");
  }

 private:
  Status refused(const std::string& what) {
    if (status_.ok())
      status_ = {StatusCode::invalid_argument, fmt::format("the pattern {} {}", quote(pattern_, 100), what)};
    return status_;
  }
  bool fail(const std::string& what) {
    (void)refused(what);
    return false;
  }
  bool no_expression(const std::string& why) { return fail("is no regular expression, " + why); }
  bool unknown(const std::string& part) {
    return fail(fmt::format("has {}, which this server does not follow: write it without", part));
  }

  bool too_long() { return fail("is too long once its classes are written out"); }

  bool more() const { return at_ < text_.size(); }
  uint32_t peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : 0; }
  bool take(uint32_t c) {
    if (!more() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  /// Up to the end or the ) of the group.
  bool alternatives(int depth, std::vector<Alternative>& all) {
    if (depth > kMaxDepth) return fail(fmt::format("has groups nested deeper than {}", kMaxDepth));
    do {
      if (!sequence(depth, all)) return false;
    } while (take('|'));
    return true;
  }

  /// What an alternative is made of: an anchor, or something with its quantifier.
  struct Item {
    char anchor = '\0';
    std::string body;
    std::vector<Alternative> group;  ///< with anchors in it
  };

  /// One alternative, appended to `all`; several where it is nothing but a group with anchors.
  bool sequence(int depth, std::vector<Alternative>& all) {
    std::vector<Item> items;
    while (more() && peek() != '|' && peek() != ')') {
      Item item;
      if (peek() == '^' || peek() == '$') {
        item.anchor = static_cast<char>(text_[at_++]);
        if (quantifier_here()) return no_expression("there is nothing to repeat");
      } else if (peek() == '(') {
        if (!group(depth, item)) return false;
      } else if (peek() == '{' && !items.empty()) {
        return no_expression("a { repeats nothing");
      } else if (!atom(item.body)) {
        return false;
      }
      if (item.anchor == '\0' && item.group.empty() && !quantifier(item.body)) return false;
      n_written_ += item.body.size();
      if (n_written_ > kMaxPlain) return too_long();
      items.push_back(std::move(item));
    }
    Alternative one;
    size_t begin = 0, end = items.size();
    while (begin < end && items[begin].anchor == '^') ++begin;
    while (begin < end && items[end - 1].anchor == '$') --end;
    one.from_start = begin > 0;
    one.to_end = end < items.size();
    if (end == begin + 1 && !items[begin].group.empty()) {
      for (Alternative& inner : items[begin].group) {
        inner.from_start = inner.from_start || one.from_start;
        inner.to_end = inner.to_end || one.to_end;
        all.push_back(std::move(inner));
      }
      return true;
    }
    for (size_t i = begin; i < end; ++i) {
      if (items[i].anchor != '\0' || !items[i].group.empty()) return unknown("a ^ or $ within it");
      one.body += items[i].body;
    }
    all.push_back(std::move(one));
    return true;
  }

  static std::string grouped(const std::vector<Alternative>& inner) {
    std::string out = "(";
    for (size_t i = 0; i < inner.size(); ++i) out += (i > 0 ? "|" : "") + inner[i].body;
    return out + ")";
  }

  bool group(int depth, Item& item) {
    ++at_;
    if (take('?')) {
      if (peek() == '<' && peek(1) != '=' && peek(1) != '!') {  // a name
        while (more() && peek() != '>') ++at_;
        if (!take('>')) return no_expression("the name of a group has no end");
      } else if (!take(':')) {
        const bool looks = peek() == '=' || peek() == '!' || peek() == '<';
        return unknown(looks ? "a look ahead or behind" : "a group with flags");
      }
    }
    std::vector<Alternative> inner;
    if (!alternatives(depth + 1, inner)) return false;
    if (!take(')')) return no_expression("a ( has no )");
    const bool anchored = std::any_of(inner.begin(), inner.end(),
                                      [](const Alternative& a) { return a.from_start || a.to_end; });
    if (anchored && quantifier_here()) return unknown("a ^ or $ within it");
    if (anchored) {
      item.group = std::move(inner);
    } else {
      item.body = grouped(inner);
    }
    return true;
  }

  bool quantifier_here() const {
    const uint32_t c = peek();
    return c == '*' || c == '+' || c == '?' || (c == '{' && peek(1) >= '0' && peek(1) <= '9');
  }

  std::optional<int64_t> number() {
    if (peek() < '0' || peek() > '9') return std::nullopt;
    int64_t n = 0;
    while (peek() >= '0' && peek() <= '9') n = std::min(kMaxCount + 1, n * 10 + (text_[at_++] - '0'));
    return n;
  }

  /// After an atom that is written already.
  bool quantifier(std::string& body) {
    if (!quantifier_here()) return true;
    std::string how;
    if (take('{')) {
      const int64_t least = *number();
      std::optional<int64_t> most = least;
      if (take(',')) most = peek() == '}' ? std::nullopt : number();
      if (!take('}')) return no_expression("a { has no }");
      if (most && *most < least) return no_expression(fmt::format("{{{},{}}} is nothing", least, *most));
      if (std::max(least, most.value_or(0)) > kMaxCount)
        return fail(fmt::format("repeats something more than {} times", kMaxCount));
      how = !most            ? fmt::format("{{{},}}", least)
            : *most == least ? fmt::format("{{{}}}", least)
                             : fmt::format("{{{},{}}}", least, *most);
    } else {
      how = static_cast<char>(text_[at_++]);
    }
    take('?');  // lazy: the same strings
    if (quantifier_here()) return no_expression("there is nothing to repeat");
    // What the converter repeats is one class or one group.
    if (body.size() == 1) {
      body = "[" + body + "]";
    } else if (body.front() != '[' || body.find(']') + 1 != body.size()) {
      if (body.front() != '(') body = "(" + body + ")";
    }
    body += how;
    return true;
  }

  bool put_set(const CharSet& set, std::string& body) {
    const std::optional<std::string> text = written(set);
    if (!text) return fail("has a class that no character is in");
    body += *text;
    return true;
  }

  bool atom(std::string& body) {
    const uint32_t c = text_[at_];
    if (c == '*' || c == '+' || c == '?' || quantifier_here())
      return no_expression("there is nothing to repeat");
    if (c == '[') return char_class(body);
    ++at_;
    if (c == '.') return put_set(line_ends().inverse(), body);
    if (c != '\\') return put_set({{c, c}}, body);
    CharSet set;
    return escape(false, set) && put_set(set, body);
  }

  /// After its backslash. In a class \b is a backspace.
  bool escape(bool in_class, CharSet& set) {
    if (!more()) return no_expression("it ends with a backslash");
    const uint32_t c = text_[at_++];
    switch (c) {
      case 'd':
        set = digits();
        return true;
      case 'D':
        set = digits().inverse();
        return true;
      case 'w':
        set = word_characters();
        return true;
      case 'W':
        set = word_characters().inverse();
        return true;
      case 's':
        set = spaces();
        return true;
      case 'S':
        set = spaces().inverse();
        return true;
      case 'p':
      case 'P':
        return unknown("a \\p class");
      case 'b':
        if (!in_class) return unknown("\\b");
        return one(8, set);
      case 'B':
        return unknown("\\B");
      case 'k':
        return unknown("a back reference");
      case 't':
        return one(9, set);
      case 'n':
        return one(10, set);
      case 'v':
        return one(11, set);
      case 'f':
        return one(12, set);
      case 'r':
        return one(13, set);
      case '0':
        return one(0, set);
      case 'x':
        return hex(2, set);
      case 'u':
        return take('{') ? hex_in_braces(set) : hex(4, set);
      case 'c':
        if ((peek() | 32U) < 'a' || (peek() | 32U) > 'z') return no_expression("\\c has no letter");
        return one(text_[at_++] % 32, set);
      default:
        if (c >= '1' && c <= '9') return unknown("a back reference");
        if ((c | 32U) >= 'a' && (c | 32U) <= 'z')
          return no_expression(fmt::format("\\{} means nothing", char(c)));
        return one(c, set);
    }
  }
  static bool one(uint32_t c, CharSet& set) {
    set = {{c, c}};
    return true;
  }
  static int hex_digit(uint32_t c) {
    if (c >= '0' && c <= '9') return static_cast<int>(c - '0');
    c |= 32U;
    return c >= 'a' && c <= 'f' ? static_cast<int>(c - 'a' + 10) : -1;
  }
  bool hex(int n, CharSet& set) {
    uint32_t c = 0;
    for (int i = 0; i < n; ++i, ++at_) {
      const int digit = hex_digit(peek());
      if (digit < 0) return no_expression("an \\x or \\u has too few digits");
      c = c * 16 + static_cast<uint32_t>(digit);
    }
    if (n == 4 && c >= 0xD800 && c < 0xDC00 && peek() == '\\' && peek(1) == 'u') {
      at_ += 2;
      CharSet low;
      if (!hex(4, low)) return false;
      const uint32_t second = low.ranges()[0].first;
      if (second < 0xDC00 || second > 0xDFFF) return no_expression("half a pair of surrogates");
      c = 0x10000 + ((c - 0xD800) << 10U) + (second - 0xDC00);
    }
    return one(c, set);
  }
  bool hex_in_braces(CharSet& set) {
    uint32_t c = 0;
    do {
      const int digit = hex_digit(peek());
      if (digit < 0 || c > kLast) return no_expression("\\u{ } holds no code point");
      c = c * 16 + static_cast<uint32_t>(digit);
      ++at_;
    } while (more() && peek() != '}');
    if (!take('}') || c > kLast) return no_expression("\\u{ } holds no code point");
    return one(c, set);
  }

  /// One member of a class, up to a whole class by its letter.
  bool member(CharSet& set) {
    const uint32_t c = text_[at_++];
    return c == '\\' ? escape(true, set) : one(c, set);
  }
  static bool is_one(const CharSet& set) {
    return set.ranges().size() == 1 && set.ranges()[0].first == set.ranges()[0].second;
  }

  bool char_class(std::string& body) {
    ++at_;
    const bool negated = take('^');
    CharSet all;
    while (more() && peek() != ']') {
      CharSet first;
      if (!member(first)) return false;
      if (peek() == '-' && peek(1) != ']' && at_ + 1 < text_.size()) {
        ++at_;
        CharSet last;
        if (!member(last)) return false;
        if (!is_one(first) || !is_one(last)) return no_expression("a range has a class at an end");
        const uint32_t a = first.ranges()[0].first, b = last.ranges()[0].first;
        if (a > b) return no_expression("a range ends before it begins");
        first.add(a, b);
      }
      all.add(first);
    }
    if (!take(']')) return no_expression("a [ has no ]");
    return put_set(negated ? all.inverse() : all, body);
  }

  const std::string& pattern_;
  std::vector<uint32_t> text_;
  size_t at_ = 0;
  size_t n_written_ = 0;
  Status status_;
};

}  // namespace

Result<std::string> plain_pattern(const std::string& pattern) { return Pattern(pattern).plain(); }

}  // namespace narrows
