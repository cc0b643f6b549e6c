// libllama's parser prints what it refuses, text and all; here its parts are called one by one, so that the
// reason becomes a Status. Its recursion is bounded before it begins.
#include "sample/grammar.h"

#include <fmt/format.h>
#include <json-schema-to-grammar.h>
#include <llama-grammar.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>

#include "base/utf8.h"
#include "text/llama_log.h"

namespace narrows {

namespace {

/// The parser descends once a bracket, some 300 bytes of stack each.
constexpr int kMaxNesting = 200;
/// Far above any schema that a person writes; the sampler's time grows with it.
constexpr size_t kMaxRules = 20'000;
constexpr size_t kMaxGrammarBytes = size_t{1} << 20;

/// Deepest nesting of round brackets, quoted ones included.
int nesting(std::string_view text) {
  int depth = 0;
  int deepest = 0;
  for (const char c : text) {
    if (c == '(') deepest = std::max(deepest, ++depth);
    if (c == ')') --depth;
  }
  return deepest;
}

/// The parser copies what is repeated, and takes {5,2} for a number of copies without end.
constexpr size_t kMaxCopies = 1'000'000;
constexpr uint64_t kMaxTimes = 2000;  ///< its own limit

Status wrong(const std::string& reason) {
  return {StatusCode::invalid_argument, fmt::format("the grammar cannot be used: {}", reason)};
}

/// The first line of an exception's text, quoted where it shows the grammar.
std::string short_reason(const char* what) {
  std::string text = what;
  text.resize(std::min(text.find('\n'), text.size()));
  const std::string quoted = quote(text, 120);
  return quoted.substr(1, quoted.size() - 2);
}

/// Index behind a quoted text or a range of characters that begins at `at` and ends with `end`.
size_t behind(std::string_view text, size_t at, char end) {
  for (++at; at < text.size() && text[at] != end; ++at) {
    if (text[at] == '\\') ++at;
  }
  return std::min(at + 1, text.size());
}

/// The numbers of "{m}", "{m,}" or "{m,n}"; false if `inside` is none of them. n without limit: UINT64_MAX.
bool read_times(std::string_view inside, uint64_t& m, uint64_t& n) {
  std::string digits[2];
  int part = 0;
  for (const char c : inside) {
    if (c == ',' && part == 0) {
      part = 1;
    } else if (c >= '0' && c <= '9') {
      digits[part] += c;
    } else if (c != ' ' && c != '\t' && c != '\r' && c != '\n') {
      return false;
    }
  }
  const auto number = [](const std::string& s) { return s.size() > 9 ? 999'999'999 : std::stoull(s); };
  if (digits[0].empty()) return false;
  m = number(digits[0]);
  n = part == 0 ? m : digits[1].empty() ? UINT64_MAX : number(digits[1]);
  return true;
}

/// Repetitions before the parser meets them: bounds of each, and the copies of all together.
Status check_repetitions(std::string_view text) {
  size_t item = 1;  // elements of what a repetition here would repeat, at most
  size_t copies = 0;
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    size_t next = at + 1;
    if (c == '#') {
      next = std::min(text.find('\n', at), text.size());
    } else if (c == '"' || c == '[') {
      next = behind(text, at, c == '"' ? '"' : ']');
      item = next - at;
    } else if (c == '{') {
      const size_t end = text.find('}', at);
      uint64_t m = 0, n = 0;
      if (end == std::string_view::npos || !read_times(text.substr(at + 1, end - at - 1), m, n))
        return wrong("a repetition must be {m}, {m,} or {m,n}");
      if (m > n) return wrong(fmt::format("the repetition {{{},{}}} ends before it begins", m, n));
      item *= std::clamp<uint64_t>(n <= kMaxTimes ? n : m, 1, kMaxTimes);
      copies += item;
      next = end + 1;
    } else if (c == '*' || c == '+' || c == '?') {
      copies += item;
    } else if (c != ' ' && c != '\t' && c != '\r' && c != '\n') {
      item = 1;  // a name or a bracket: the rest is a rule of its own
    }
    if (copies > kMaxCopies) return wrong("its repetitions are too many together");
    at = next;
  }
  return {};
}

}  // namespace

Status check_grammar(const std::string& gbnf) {
  if (gbnf.size() > kMaxGrammarBytes) return wrong(fmt::format("it has {} bytes", gbnf.size()));
  if (gbnf.find('\0') != std::string::npos) return wrong("it holds a zero byte");
  if (nesting(gbnf) > kMaxNesting)
    return wrong(fmt::format("brackets are nested deeper than {}", kMaxNesting));
  if (Status s = check_repetitions(gbnf); !s.ok()) return s;
  const LlamaAbortGuard guard;
  try {
    llama_grammar_parser parser;
    // As llama_grammar_parser::parse() goes through the rules; spaces before a rule are read by the rule
    // before.
    const char* at = gbnf.c_str();
    while (*at == ' ' || *at == '\t' || *at == '\r' || *at == '\n' || *at == '#') {
      if (*at == '#') {
        while (*at != '\0' && *at != '\n') ++at;
      } else {
        ++at;
      }
    }
    while (*at != '\0') {
      at = parser.parse_rule(at);
      if (parser.rules.size() > kMaxRules) return wrong("it has too many rules");
    }
    for (const auto& [name, id] : parser.symbol_ids) {
      if (id >= parser.rules.size() || parser.rules[id].empty())
        return wrong(fmt::format("rule {} is not defined", quote(name)));
    }
    if (!parser.symbol_ids.contains("root")) return wrong("it has no rule called root");
    return {};
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no memory for the grammar"};
  } catch (const std::exception& error) {
    return wrong(short_reason(error.what()));
  }
}

Result<std::string> grammar_of_schema(const std::string& schema_json) {
  const LlamaAbortGuard guard;
  try {
    std::string gbnf = json_schema_to_grammar(common_json::parse(schema_json), /*force_gbnf=*/true);
    if (Status s = check_grammar(gbnf); !s.ok()) return s;
    return gbnf;
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::out_of_memory, "no memory to convert the schema");
  } catch (const std::exception& error) {
    return Status(StatusCode::invalid_argument, short_reason(error.what()));
  }
}

}  // namespace narrows
