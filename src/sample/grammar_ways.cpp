// What libllama does when it takes a token, with an end: ways that are equal are found in a set, and too many
// of them end it.
#include <set>

#include "base/utf8.h"
#include "sample/schema_check.h"

namespace narrows {

namespace {

using Stack = llama_grammar_stack;
using Stacks = std::set<Stack>;
using Element = llama_grammar_element;

bool ends(const Element* e) { return e->type == LLAMA_GRETYPE_END || e->type == LLAMA_GRETYPE_ALT; }

/// Puts the ways of `stack`, which each begin with a character, into `ways`; false if they are too many.
bool open(const llama_grammar_rules& rules, Stack stack, Stacks& ways) {
  Stacks seen;
  std::vector<Stack> todo{std::move(stack)};
  while (!todo.empty()) {
    Stack at = std::move(todo.back());
    todo.pop_back();
    if (!seen.insert(at).second) continue;
    if (seen.size() > size_t{4} * kMaxWays) return false;
    if (at.empty() || at.back()->type != LLAMA_GRETYPE_RULE_REF) {
      ways.insert(std::move(at));
      if (ways.size() > size_t{kMaxWays}) return false;
      continue;
    }
    const Element* top = at.back();
    at.pop_back();
    if (!ends(top + 1)) at.push_back(top + 1);
    for (const Element* e = rules[top->value].data();; ++e) {
      Stack next = at;
      if (!ends(e)) next.push_back(e);
      todo.push_back(std::move(next));
      while (!ends(e)) ++e;
      if (e->type == LLAMA_GRETYPE_END) break;
    }
  }
  return true;
}

/// Whether the set of characters at `e` has c; `e` is behind it then.
bool has(const Element*& e, uint32_t c) {
  const bool wanted = e->type != LLAMA_GRETYPE_CHAR_NOT;
  bool found = false;
  do {
    if (e[1].type == LLAMA_GRETYPE_CHAR_RNG_UPPER) {
      found = found || (e->value <= c && c <= e[1].value);
      e += 2;
    } else {
      found = found || e->type == LLAMA_GRETYPE_CHAR_ANY || e->value == c;
      ++e;
    }
  } while (e->type == LLAMA_GRETYPE_CHAR_ALT);
  return found == wanted;
}

uint32_t code_point(std::string_view bytes) {
  const auto first = static_cast<unsigned char>(bytes[0]);
  uint32_t c = bytes.size() == 1 ? first : first & (0x7FU >> bytes.size());
  for (const char b : bytes.substr(1)) c = c << 6 | (static_cast<unsigned char>(b) & 0x3FU);
  return c;
}

}  // namespace

bool ways_are_few(llama_grammar& grammar, const std::string& piece) {
  const llama_grammar_stacks& now = llama_grammar_get_stacks(&grammar);
  Stacks ways(now.begin(), now.end());
  for (std::string_view rest = piece; !rest.empty();) {
    const Utf8Sequence sequence = first_utf8_sequence(rest);
    if (sequence.kind != Utf8Kind::valid) return true;
    const uint32_t c = code_point(rest.substr(0, sequence.length));
    rest.remove_prefix(sequence.length);
    Stacks next;
    for (const Stack& stack : ways) {
      if (stack.empty()) continue;
      const Element* e = stack.back();
      if (e->type == LLAMA_GRETYPE_TOKEN || e->type == LLAMA_GRETYPE_TOKEN_NOT || !has(e, c)) continue;
      Stack after(stack.begin(), stack.end() - 1);
      if (!ends(e)) after.push_back(e);
      if (!open(llama_grammar_get_rules(&grammar), std::move(after), next)) return false;
    }
    ways = std::move(next);
  }
  return true;
}

}  // namespace narrows
