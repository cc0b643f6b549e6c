// libllama looks for rules that begin with themselves by a recursion that knows no rule as empty whose parts
// are (so that its sampler then pushes without end), and that walks a rule again each time that it meets it
// (so that forty rules can take longer than the universe).
#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "sample/schema_check.h"

namespace narrows {

namespace {

/// Rules that libllama may look at, each time anew; some 20 ns each.
constexpr int64_t kMaxVisits = 20'000'000;
/// Its recursion takes some 200 bytes of stack a rule.
constexpr int64_t kMaxChain = 5000;
constexpr int64_t kMany = std::numeric_limits<int64_t>::max() / 4;

/// Of a way and the one behind it: the sampler looks at all of them for tokens of several characters.
constexpr int64_t kMaxPairs = 10'000;

using Rule = llama_grammar_rule;

bool ends(const llama_grammar_element& e) {
  return e.type == LLAMA_GRETYPE_END || e.type == LLAMA_GRETYPE_ALT;
}

/// A part of the last one's set of characters.
bool goes_on(const llama_grammar_element& e) {
  return e.type == LLAMA_GRETYPE_CHAR_ALT || e.type == LLAMA_GRETYPE_CHAR_RNG_UPPER;
}

int64_t sum(int64_t a, int64_t b) { return std::min(a + b, kMany); }

/// Rules that can be passed without a character.
std::vector<bool> nullable_rules(const llama_grammar_rules& rules) {
  struct Alternative {
    size_t rule;
    int64_t missing;  ///< references that are not known as nullable yet
  };
  std::vector<Alternative> alternatives;
  std::vector<std::vector<size_t>> users(rules.size());  // of a rule: alternatives of references alone
  std::vector<bool> nullable(rules.size());
  std::vector<size_t> news;
  const auto take = [&](size_t rule) {
    if (!nullable[rule]) news.push_back(rule);
    nullable[rule] = true;
  };
  for (size_t r = 0; r < rules.size(); ++r) {
    for (size_t begin = 0; begin < rules[r].size();) {
      size_t end = begin;
      bool only_rules = true;
      while (!ends(rules[r][end])) only_rules &= rules[r][end++].type == LLAMA_GRETYPE_RULE_REF;
      if (begin == end) {
        take(r);
      } else if (only_rules) {
        for (size_t i = begin; i < end; ++i) users[rules[r][i].value].push_back(alternatives.size());
        alternatives.push_back({r, static_cast<int64_t>(end - begin)});
      }
      begin = end + 1;
    }
  }
  while (!news.empty()) {
    const size_t rule = news.back();
    news.pop_back();
    for (const size_t a : users[rule]) {
      if (--alternatives[a].missing == 0) take(alternatives[a].rule);
    }
  }
  return nullable;
}

/// A rule that can stand at the beginning of another.
struct Edge {
  size_t to;
  bool last;  ///< nothing stands behind it
  bool seen;  ///< by libllama, which knows as empty only what has an empty alternative
};
using Graph = std::vector<std::vector<Edge>>;

bool has_empty_alternative(const Rule& rule) {
  bool at_begin = true;
  for (const llama_grammar_element& e : rule) {
    if (ends(e) && at_begin) return true;
    at_begin = ends(e);
  }
  return false;
}

Graph beginnings(const llama_grammar_rules& rules, const std::vector<bool>& nullable) {
  std::vector<bool> empty(rules.size());
  for (size_t r = 0; r < rules.size(); ++r) empty[r] = has_empty_alternative(rules[r]);
  Graph graph(rules.size());
  for (size_t r = 0; r < rules.size(); ++r) {
    bool leads = true, seen = true;
    for (size_t i = 0; i < rules[r].size(); ++i) {
      const llama_grammar_element& e = rules[r][i];
      if (ends(e)) {
        leads = seen = true;
      } else if (leads && e.type == LLAMA_GRETYPE_RULE_REF) {
        graph[r].push_back({e.value, ends(rules[r][i + 1]), seen});
        leads = nullable[e.value];
        seen = seen && empty[e.value];
      } else {
        leads = seen = false;
      }
    }
  }
  return graph;
}

/// Groups of rules that lead to each other, by Tarjan's algorithm; `order`: a rule comes behind those that it
/// leads to, but for those of its group.
struct Groups {
  Groups(const Graph& graph, bool only_seen) : group(graph.size(), kNone), low_(graph.size(), kNone) {
    std::vector<size_t> index(graph.size(), kNone), stack;
    struct Open {
      size_t rule, edge;
    };
    std::vector<Open> path;
    size_t n_index = 0;
    const auto open = [&](size_t rule) {
      index[rule] = low_[rule] = n_index++;
      stack.push_back(rule);
      path.push_back({rule, 0});
    };
    for (size_t start = 0; start < graph.size(); ++start) {
      if (index[start] == kNone) open(start);
      while (!path.empty()) {
        const size_t rule = path.back().rule;
        if (path.back().edge < graph[rule].size()) {
          const Edge& e = graph[rule][path.back().edge++];
          if (only_seen && !e.seen) continue;
          if (index[e.to] == kNone) {
            open(e.to);
          } else if (group[e.to] == kNone) {
            low_[rule] = std::min(low_[rule], index[e.to]);
          }
          continue;
        }
        path.pop_back();
        if (!path.empty()) low_[path.back().rule] = std::min(low_[path.back().rule], low_[rule]);
        if (low_[rule] != index[rule]) continue;
        for (size_t r = kNone; r != rule;) {
          r = stack.back();
          stack.pop_back();
          group[r] = rule;
          order.push_back(r);
        }
      }
    }
  }

  static constexpr size_t kNone = std::numeric_limits<size_t>::max();
  std::vector<size_t> group, order;

 private:
  std::vector<size_t> low_;
};

/// Places where a character may be read first, the empty way included, and where the next one may be read
/// then.
struct Ways {
  int64_t first = 0;
  int64_t second = 0;
};
Ways both(Ways a, Ways b) { return {sum(a.first, b.first), sum(a.second, b.second)}; }
Ways larger(Ways a, Ways b) { return {std::max(a.first, b.first), std::max(a.second, b.second)}; }

/// From the rule's beginnings; from the place within it that has most of them in `most`.
Ways ways_of(const Rule& rule, const std::vector<bool>& nullable, const std::vector<Ways>& ways, Ways& most) {
  constexpr Ways kEnd{1, 1};
  Ways all, from_here = kEnd;  // of the rest of an alternative, from its end on
  for (size_t i = rule.size(); i-- > 0;) {
    if (ends(rule[i])) {
      if (i + 1 < rule.size()) all = both(all, from_here);
      from_here = kEnd;
    } else if (rule[i].type == LLAMA_GRETYPE_RULE_REF) {
      const size_t to = rule[i].value;
      from_here = both(ways[to], nullable[to] ? from_here : Ways());
    } else if (!goes_on(rule[i])) {
      from_here = {1, from_here.first};
    }
    most = larger(most, from_here);
  }
  all = both(all, from_here);
  most = larger(most, all);
  return all;
}

Status refusal(const char* why) { return {StatusCode::invalid_argument, why}; }

}  // namespace

Status check_rules(const llama_grammar_rules& rules) {
  const std::vector<bool> nullable = nullable_rules(rules);
  const Graph graph = beginnings(rules, nullable);
  const Groups seen(graph, true), all(graph, false);
  for (size_t r = 0; r < rules.size(); ++r) {
    for (const Edge& e : graph[r]) {
      // A circle of last rules adds nothing to a stack; libllama refuses it if it sees it.
      if ((e.seen && seen.group[r] == seen.group[e.to]) || (!e.last && all.group[r] == all.group[e.to]))
        return refusal("left recursion: a rule leads back to itself before any character");
    }
  }
  std::vector<int64_t> visits(rules.size(), 1), chain(rules.size(), 1);
  std::vector<Ways> ways(rules.size());
  int64_t all_visits = 0, longest = 0;
  Ways most;
  for (const size_t r : seen.order) {
    for (const Edge& e : graph[r]) {
      if (!e.seen) continue;
      visits[r] = sum(visits[r], visits[e.to]);
      chain[r] = std::max(chain[r], chain[e.to] + 1);
    }
    all_visits = sum(all_visits, visits[r]);
    longest = std::max(longest, chain[r]);
  }
  // What a rule begins with is counted before it; what stands within it, and is read second, not always: so
  // twice, and the largest of all places once everything is known.
  for (int round = 0; round < 2; ++round) {
    for (const size_t r : all.order) ways[r] = ways_of(rules[r], nullable, ways, most);
  }
  for (const Rule& rule : rules) (void)ways_of(rule, nullable, ways, most);
  if (most.first > kMaxWays || most.second > kMaxPairs)
    return {StatusCode::invalid_argument,
            fmt::format("it goes on in more than {} ways at one place", kMaxWays)};
  if (longest > kMaxChain || all_visits > kMaxVisits)
    return refusal("its rules lead through too many others before any character");
  return {};
}

}  // namespace narrows
