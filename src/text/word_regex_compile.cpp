// From an expression to the matcher's steps: a tree first, in which a repeated set becomes one run, and a
// lookahead at one set before another becomes what both have in common.
#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "text/word_regex.h"

namespace narrows {
namespace {

constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();
constexpr size_t kMostSteps = 20'000;
constexpr size_t kMostTimes = 4096;
constexpr int kMostNesting = 50;

/// Thrown and caught within this file: the expression is not one of those that this engine knows.
struct Unknown {};

struct Node {
  enum class Kind { set, sequence, alternatives, repeat, ahead, end };
  Kind kind = Kind::sequence;
  UnitSet set;
  std::vector<Node> parts;
  size_t min = 0;
  size_t max = 0;
  bool negative = false;

  bool can_be_empty() const {
    switch (kind) {
      case Kind::set:
        return false;
      case Kind::sequence:
        return std::all_of(parts.begin(), parts.end(), [](const Node& n) { return n.can_be_empty(); });
      case Kind::alternatives:
        return std::any_of(parts.begin(), parts.end(), [](const Node& n) { return n.can_be_empty(); });
      case Kind::repeat:
        return min == 0 || parts[0].can_be_empty();
      case Kind::ahead:
      case Kind::end:
        return true;
    }
    return true;
  }
};

UnitSet ranges(std::initializer_list<std::pair<uint32_t, uint32_t>> list) {
  UnitSet set;
  for (const auto& [first, last] : list) set.add(first, last);
  return set;
}

/// llama.cpp's table: the byte of the category and its ASCII characters; all kinds of letters are letters.
UnitSet category(std::string_view name) {
  using R = WordRegex;
  if (name == "N") return ranges({{R::kNumber, R::kNumber}, {'0', '9'}});
  if (name == "P")
    return ranges({{R::kPunctuation, R::kPunctuation},
                   {'!', '#'},
                   {'%', '*'},
                   {',', '/'},
                   {':', ';'},
                   {'?', '@'},
                   {'[', ']'},
                   {'_', '_'},
                   {'{', '{'},
                   {'}', '}'}});
  if (name == "M") return ranges({{R::kMark, R::kMark}});
  if (name == "S")
    return ranges({{R::kSymbol, R::kSymbol},
                   {'$', '$'},
                   {'+', '+'},
                   {'<', '>'},
                   {'^', '^'},
                   {'`', '`'},
                   {'|', '|'},
                   {'~', '~'}});
  for (const char* letter : {"L", "Lu", "Ll", "Lt", "Lm", "Lo"})
    if (name == letter) return ranges({{R::kLetter, R::kLetter}, {'A', 'Z'}, {'a', 'z'}});
  throw Unknown();
}

class Parser {
 public:
  explicit Parser(std::string_view text) : rest_(text) {}

  Node whole() {
    Node node = alternatives();
    if (!rest_.empty()) throw Unknown();
    return node;
  }

 private:
  bool take(std::string_view prefix) {
    if (!rest_.starts_with(prefix)) return false;
    rest_.remove_prefix(prefix.size());
    return true;
  }

  uint32_t code_point() {
    if (rest_.empty()) throw Unknown();
    const auto lead = static_cast<unsigned char>(rest_[0]);
    const size_t n = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if (rest_.size() < n || (lead >= 0x80 && lead < 0xC0)) throw Unknown();
    uint32_t code = n == 1 ? lead : lead & (0xFFU >> (n + 1));
    for (size_t i = 1; i < n; ++i) code = code << 6 | (static_cast<unsigned char>(rest_[i]) & 0x3F);
    rest_.remove_prefix(n);
    return code;
  }

  /// Behind a backslash: a set, or one unit, which may begin a range.
  std::optional<UnitSet> escaped_set() {
    if (take("p{")) {
      const size_t close = rest_.find('}');
      if (close == std::string_view::npos) throw Unknown();
      const UnitSet set = category(rest_.substr(0, close));
      rest_.remove_prefix(close + 1);
      return set;
    }
    const UnitSet space = ranges({{'\t', '\r'}, {' ', ' '}});
    if (take("s")) return space;
    if (take("S")) return space.complement();
    if (take("d")) return ranges({{'0', '9'}});
    return std::nullopt;
  }

  uint32_t escaped_unit() {
    if (take("r")) return '\r';
    if (take("n")) return '\n';
    if (take("t")) return '\t';
    const uint32_t unit = code_point();
    const bool word = (unit >= 'a' && unit <= 'z') || (unit >= 'A' && unit <= 'Z') ||
                      (unit >= '0' && unit <= '9') || unit >= 0x80;
    if (word) throw Unknown();  // \b, \w, \1, ...
    return unit;
  }

  UnitSet bracketed() {
    const bool negative = take("^");
    UnitSet set;
    if (rest_.starts_with("]")) throw Unknown();  // empty in one grammar, a bracket in another
    while (!take("]")) {
      if (rest_.starts_with("[:") || rest_.starts_with("[.") || rest_.starts_with("[=")) throw Unknown();
      uint32_t first = 0;
      if (take("\\")) {
        if (std::optional<UnitSet> some = escaped_set()) {
          set.add(*some);
          continue;
        }
        first = escaped_unit();
      } else {
        first = code_point();
      }
      uint32_t last = first;
      if (rest_.starts_with("-") && !rest_.starts_with("-]")) {
        (void)take("-");
        last = take("\\") ? escaped_unit() : code_point();
        if (last < first) throw Unknown();
      }
      set.add(first, last);
    }
    return negative ? set.complement() : set;
  }

  Node group(Node::Kind kind, bool negative) {
    if (++depth_ > kMostNesting) throw Unknown();
    Node inner = alternatives();
    --depth_;
    if (!take(")")) throw Unknown();
    if (kind != Node::Kind::ahead) return inner;
    Node node;
    node.kind = kind;
    node.negative = negative;
    node.parts.push_back(std::move(inner));
    return node;
  }

  static Node of(UnitSet set) {
    Node node;
    node.kind = Node::Kind::set;
    node.set = std::move(set);
    return node;
  }

  Node atom() {
    if (take("(?:")) return group(Node::Kind::sequence, false);
    if (take("(?=")) return group(Node::Kind::ahead, false);
    if (take("(?!")) return group(Node::Kind::ahead, true);
    if (rest_.starts_with("(?")) throw Unknown();
    if (take("(")) return group(Node::Kind::sequence, false);
    if (take("[")) return of(bracketed());
    if (take("$")) {
      Node node;
      node.kind = Node::Kind::end;
      return node;
    }
    if (take("\\")) {
      if (std::optional<UnitSet> set = escaped_set()) return of(std::move(*set));
      const uint32_t unit = escaped_unit();
      return of(ranges({{unit, unit}}));
    }
    if (std::string_view("*+?{}]^.").find(rest_[0]) != std::string_view::npos) throw Unknown();
    const uint32_t unit = code_point();
    return of(ranges({{unit, unit}}));
  }

  size_t number() {
    size_t n = 0;
    bool any = false;
    while (!rest_.empty() && rest_[0] >= '0' && rest_[0] <= '9') {
      n = n * 10 + static_cast<size_t>(rest_[0] - '0');
      if (n > kMostTimes) throw Unknown();
      rest_.remove_prefix(1);
      any = true;
    }
    if (!any) throw Unknown();
    return n;
  }

  Node repeated(Node what) {
    size_t min = 1, max = 1;
    if (take("*")) {
      min = 0, max = kUnlimited;
    } else if (take("+")) {
      min = 1, max = kUnlimited;
    } else if (take("?")) {
      min = 0, max = 1;
    } else if (take("{")) {
      min = max = number();
      if (take(",")) max = rest_.starts_with("}") ? kUnlimited : number();
      if (!take("}") || max < min || max == 0) throw Unknown();
    } else {
      return what;
    }
    // Lazy and possessive ones are others.
    if (!rest_.empty() && std::string_view("*+?{").find(rest_[0]) != std::string_view::npos) throw Unknown();
    if (what.can_be_empty()) throw Unknown();
    Node node;
    node.kind = Node::Kind::repeat;
    node.min = min;
    node.max = max;
    node.parts.push_back(std::move(what));
    return node;
  }

  Node sequence() {
    Node node;
    while (!rest_.empty() && rest_[0] != '|' && rest_[0] != ')') node.parts.push_back(repeated(atom()));
    const bool common = node.parts.size() == 2 && node.parts[0].kind == Node::Kind::ahead &&
                        !node.parts[0].negative && node.parts[0].parts[0].kind == Node::Kind::set &&
                        node.parts[1].kind == Node::Kind::set;
    if (common) return of(node.parts[0].parts[0].set.both(node.parts[1].set));
    return node.parts.size() == 1 ? Node(std::move(node.parts[0])) : node;
  }

  Node alternatives() {
    Node node;
    node.kind = Node::Kind::alternatives;
    do {
      node.parts.push_back(sequence());
    } while (take("|"));
    return node.parts.size() == 1 ? Node(std::move(node.parts[0])) : node;
  }

  std::string_view rest_;
  int depth_ = 0;
};

}  // namespace

class WordRegexCompiler {
 public:
  using Step = WordRegex::Step;

  explicit WordRegexCompiler(WordRegex& regex) : regex_(regex) {}

  void whole(const Node& node) {
    emit(node);
    add(Step::Op::match);
    for (size_t at = 0; at < regex_.steps_.size(); ++at) {
      Step& step = regex_.steps_[at];
      seen_.assign(regex_.steps_.size(), false);
      if (step.op == Step::Op::fork) step.sure = cannot_fail(step.other);
      if (step.op == Step::Op::run) step.sure = cannot_fail(at + 1);
    }
  }

 private:
  size_t add(Step::Op op) {
    if (regex_.steps_.size() >= kMostSteps) throw Unknown();
    regex_.steps_.emplace_back().op = op;
    return regex_.steps_.size() - 1;
  }

  Step& step(size_t at) { return regex_.steps_[at]; }
  size_t next() const { return regex_.steps_.size(); }

  size_t add_set(Step::Op op, const UnitSet& set) {
    const size_t at = add(op);
    step(at).set = regex_.sets_.size();
    regex_.sets_.push_back(set);
    return at;
  }

  void emit(const Node& node) {
    switch (node.kind) {
      case Node::Kind::set:
        add_set(Step::Op::one, node.set);
        break;
      case Node::Kind::sequence:
        for (const Node& part : node.parts) emit(part);
        break;
      case Node::Kind::alternatives:
        emit_alternatives(node);
        break;
      case Node::Kind::repeat:
        emit_repeat(node);
        break;
      case Node::Kind::ahead: {
        const size_t at = add(Step::Op::ahead);
        step(at).negative = node.negative;
        step(at).to = next();
        emit(node.parts[0]);
        add(Step::Op::match);
        step(at).other = next();
        break;
      }
      case Node::Kind::end:
        add(Step::Op::end);
        break;
    }
  }

  void emit_alternatives(const Node& node) {
    std::vector<size_t> ends;
    for (size_t i = 0; i + 1 < node.parts.size(); ++i) {
      const size_t fork = add(Step::Op::fork);
      step(fork).to = next();
      emit(node.parts[i]);
      ends.push_back(add(Step::Op::jump));
      step(fork).other = next();
    }
    emit(node.parts.back());
    for (const size_t jump : ends) step(jump).to = next();
  }

  void emit_repeat(const Node& node) {
    const Node& what = node.parts[0];
    if (what.kind == Node::Kind::set) {
      const size_t run = add_set(Step::Op::run, what.set);
      step(run).min = node.min;
      step(run).max = node.max;
      return;
    }
    for (size_t i = 0; i < node.min; ++i) emit(what);
    if (node.max == kUnlimited) {
      const size_t fork = add(Step::Op::fork);
      step(fork).to = next();
      emit(what);
      step(add(Step::Op::jump)).to = fork;
      step(fork).other = next();
      return;
    }
    std::vector<size_t> forks;
    for (size_t i = node.min; i < node.max; ++i) {
      forks.push_back(add(Step::Op::fork));
      step(forks.back()).to = next();
      emit(what);
    }
    for (const size_t fork : forks) step(fork).other = next();
  }

  /// True if a match follows step `at` whatever the text is.
  bool cannot_fail(size_t at) {
    if (seen_[at]) return false;  // a loop, or found wanting before
    seen_[at] = true;
    const Step& s = regex_.steps_[at];
    switch (s.op) {
      case Step::Op::match:
        return true;
      case Step::Op::jump:
        return cannot_fail(s.to);
      case Step::Op::fork:
        return cannot_fail(s.other) || cannot_fail(s.to);
      case Step::Op::run:
        return s.min == 0 && cannot_fail(at + 1);
      default:
        return false;
    }
  }

  WordRegex& regex_;
  std::vector<bool> seen_;
};

std::unique_ptr<const WordRegex> WordRegex::compile(std::string_view expression) {
  try {
    const Node tree = Parser(expression).whole();
    auto regex = std::make_unique<WordRegex>();
    WordRegexCompiler(*regex).whole(tree);
    return regex;
  } catch (const Unknown&) {
    return nullptr;
  }
}

}  // namespace narrows
