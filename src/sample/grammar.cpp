// libllama's parser prints what it refuses, text and all; here its parts are called one by one, so that the
// reason becomes a Status. Its recursion is bounded before it begins.
#include "sample/grammar.h"

#include <fmt/format.h>
#include <json-schema-to-grammar.h>
#include <llama-grammar.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <optional>

#include "base/utf8.h"
#include "sample/schema_check.h"
#include "text/llama_log.h"

namespace narrows {

namespace {

/// The parser descends once a bracket, some 300 bytes of stack each.
constexpr int kMaxNesting = 200;
/// Far above any schema that a person writes; the sampler's time grows with it.
constexpr size_t kMaxRules = 20'000;
constexpr size_t kMaxGrammarBytes = size_t{1} << 20;
/// Of the names of all rules, those that the parser makes included.
constexpr size_t kMaxNameBytes = size_t{1} << 24;

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

/// The first line of an exception's text without its full stop, quoted where it shows the grammar.
std::string short_reason(const char* what) {
  std::string text = what;
  text.resize(std::min(text.find('\n'), text.size()));
  const std::string quoted = quote(text, 120);
  const size_t end = quoted.find_last_not_of('.', quoted.size() - 2);
  return quoted.substr(1, end == std::string::npos ? 0 : end);
}

/// The converter's own reasons come in lines below a heading.
const char* without_heading(const char* what) {
  const char* line = std::strchr(what, '\n');
  return std::strncmp(what, "JSON schema conversion failed", 29) == 0 && line != nullptr ? line + 1 : what;
}

/// Brackets of any kind, in strings too: a schema that has more in its strings is none that a person writes.
int deepest_bracket(std::string_view json) {
  int depth = 0, deepest = 0;
  for (const char c : json) {
    if (c == '{' || c == '[') deepest = std::max(deepest, ++depth);
    if ((c == '}' || c == ']') && depth > 0) --depth;
  }
  return deepest;
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

bool is_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
}

/// Repetitions before the parser meets them: bounds of each, and the copies of all together.
Status check_repetitions(std::string_view text) {
  size_t item = 1;  // elements of what a repetition here would repeat, at most
  size_t copies = 0;
  // The parser makes rules of brackets and repetitions, named as the rule that they are in.
  size_t word = 0, rules = 0, name = 0, name_bytes = 0;
  const auto make_rules = [&](size_t n) {
    rules += n;
    name_bytes += n * name;
  };
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
      make_rules(n > kMaxTimes ? 1 : n - m);
      next = end + 1;
    } else if (c == '*' || c == '+' || c == '?') {
      copies += item;
      make_rules(1);
    } else if (c == '(') {
      make_rules(1);
      item = 1;
    } else if (text.substr(at, 3) == "::=") {
      name = word;
      make_rules(1);
      next = at + 3;
    } else if (c != ' ' && c != '\t' && c != '\r' && c != '\n') {
      item = 1;  // a name or a bracket: the rest is a rule of its own
      if (is_name(c)) {
        while (next < text.size() && is_name(text[next])) ++next;
        word = next - at;
      }
    }
    if (rules > kMaxRules || name_bytes > kMaxNameBytes) return wrong("it has too many rules");
    if (copies > kMaxCopies) return wrong("its repetitions are too many together");
    at = next;
  }
  return {};
}

Status parse(const std::string& gbnf, llama_grammar_parser& parser) {
  if (gbnf.size() > kMaxGrammarBytes) return wrong(fmt::format("it has {} bytes", gbnf.size()));
  if (gbnf.find('\0') != std::string::npos) return wrong("it holds a zero byte");
  if (nesting(gbnf) > kMaxNesting)
    return wrong(fmt::format("brackets are nested deeper than {}", kMaxNesting));
  if (Status s = check_repetitions(gbnf); !s.ok()) return s;
  const LlamaAbortGuard guard;
  try {
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
    for (const llama_grammar_rule& rule : parser.rules) {
      for (const llama_grammar_element& e : rule) {
        if (e.type == LLAMA_GRETYPE_TOKEN || e.type == LLAMA_GRETYPE_TOKEN_NOT)
          return wrong("it refers to a token, only characters are taken");
        // Such a set has no character, and the answer that comes to it could not go on.
        if (e.type == LLAMA_GRETYPE_CHAR_RNG_UPPER && e.value < (&e)[-1].value)
          return wrong("a range of characters ends before it begins");
      }
    }
    if (!parser.symbol_ids.contains("root")) return wrong("it has no rule called root");
    if (Status s = check_rules(parser.rules); !s.ok()) return wrong(s.message());
    return {};
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no memory for the grammar"};
  } catch (const std::exception& error) {
    return wrong(short_reason(error.what()));
  }
}

}  // namespace

Status check_grammar(const std::string& gbnf) {
  llama_grammar_parser parser;
  return parse(gbnf, parser);
}

Result<std::unique_ptr<GrammarMatcher>> make_grammar(const std::string& gbnf) {
  llama_grammar_parser parser;
  if (Status s = parse(gbnf, parser); !s.ok()) return s;
  try {
    return std::make_unique<GrammarMatcher>(parser.rules, parser.symbol_ids.at("root"));
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::out_of_memory, "no memory for the grammar");
  }
}

namespace {

using Early = std::optional<Result<std::string>>;

/// A schema, checked and prepared, through `last`; what `first` gives before that is the result.
template <class First, class Last>
Result<std::string> convert_schema(const std::string& schema_json, SchemaWork* work, First&& first,
                                   Last&& last) {
  SchemaReferences references;
  if (schema_json.size() > kMaxGrammarBytes)
    return Status(StatusCode::invalid_argument, fmt::format("the schema has {} bytes", schema_json.size()));
  if (deepest_bracket(schema_json) > kMaxNesting)
    return Status(StatusCode::invalid_argument,
                  fmt::format("the schema is nested deeper than {} levels", kMaxNesting));
  const LlamaAbortGuard guard;
  try {
    common_json schema = common_json::parse(schema_json);
    if (Early early = first(schema)) return std::move(*early);
    if (Status s = plain_schema(schema, references); !s.ok()) return s;
    if (Status s = check_schema(schema); !s.ok()) return s;
    common_chat_schema_document document = common_chat_schema_from_json(schema);
    if (Status s = prepare_schema(document, references, work); !s.ok()) return s;
    return last(schema, document);
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::out_of_memory, "no memory to convert the schema");
  } catch (const std::exception& error) {
    const std::string reason = references.with_originals(without_heading(error.what()));
    return Status(StatusCode::invalid_argument, short_reason(reason.c_str()));
  }
}

}  // namespace

Result<std::string> grammar_of_schema(const std::string& schema_json) {
  return convert_schema(
      schema_json, nullptr, [](const common_json&) { return Early(); },
      [](const common_json&, const common_chat_schema_document& document) -> Result<std::string> {
        std::string gbnf = json_schema_to_grammar(document);
        if (Status s = check_grammar(gbnf); !s.ok()) return s;
        return gbnf;
      });
}

Result<std::string> tool_parameters(const std::string& schema_json, SchemaWork& work) {
  return convert_schema(
      schema_json, &work,
      [](const common_json& schema) -> Early {
        if (!schema.is_object()) return Status(StatusCode::invalid_argument, "the schema is no object");
        if (schema.empty()) return std::string("{}");
        if (schema.contains("type") && schema.at("type") != "object")
          return Status(StatusCode::invalid_argument, "the schema must have the type object");
        return std::nullopt;
      },
      [](const common_json& schema, const common_chat_schema_document&) -> Result<std::string> {
        return schema.dump();
      });
}

}  // namespace narrows
