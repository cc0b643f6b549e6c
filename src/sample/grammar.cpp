// libllama's parser prints what it refuses, text and all; here its parts are called one by one, so that the
// reason becomes a Status. Its recursion is bounded before it begins.
#include "sample/grammar.h"

#include <fmt/format.h>
#include <json-schema-to-grammar.h>
#include <llama-grammar.h>

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

}  // namespace

Status check_grammar(const std::string& gbnf) {
  if (gbnf.size() > kMaxGrammarBytes) return wrong(fmt::format("it has {} bytes", gbnf.size()));
  if (gbnf.find('\0') != std::string::npos) return wrong("it holds a zero byte");
  if (nesting(gbnf) > kMaxNesting)
    return wrong(fmt::format("brackets are nested deeper than {}", kMaxNesting));
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
