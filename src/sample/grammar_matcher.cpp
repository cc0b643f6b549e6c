#include "sample/grammar_matcher.h"

#include <fmt/format.h>

#include <algorithm>

#include "sample/schema_check.h"

namespace narrows {

namespace {

// Prices in steps; one is about a nanosecond.
constexpr int64_t kStepsOfAStack = 100;
constexpr int64_t kStepsOfAState = 2000;
constexpr int64_t kSharedPiece = 50'000;  ///< steps that are taken at once, for the sake of threads
// What is kept from draw to draw: some 64, 50 and 30 MB.
constexpr size_t kMaxStacks = 1'000'000;
constexpr size_t kMaxWaysKept = 4'000'000;
constexpr size_t kMaxStates = 20'000;

constexpr uint32_t kLastCharacter = 0x10FFFF;

}  // namespace

GrammarMatcher::GrammarMatcher(const llama_grammar_rules& rules, size_t root) {
  for (const llama_grammar_rule& rule : rules) {
    rules_.push_back(static_cast<uint32_t>(elements_.size()));
    elements_.insert(elements_.end(), rule.begin(), rule.end());
  }
  reset();
  std::vector<StackId> begin, ways;
  for (uint32_t at = rules_[root];; ++at) {
    begin.push_back(ends(at) ? 0 : push(at, 0));
    while (!ends(at)) ++at;
    if (elements_[at].type == LLAMA_GRETYPE_END) break;
  }
  if (open(std::move(begin), ways)) at_.state = intern(std::move(ways));
}

void GrammarMatcher::reset() {
  stacks_.assign(1, {0, 0});
  stack_ids_.clear();
  seen_.assign(1, 0);
  states_.clear();
  state_ids_.clear();
  n_ways_ = 0;
}

void GrammarMatcher::begin_draw() {
  budget_ = std::min(kGrammarBudget, budget_ + kGrammarBudgetOfADraw);
  if (at_.state < 0) return;
  if (stacks_.size() <= kMaxStacks && n_ways_ <= kMaxWaysKept && states_.size() <= kMaxStates) return;
  // Only the stacks of the state that it stands in, from below.
  const std::vector<Stack> old = std::move(stacks_);
  const std::vector<StackId> ways = std::move(states_[static_cast<size_t>(at_.state)]->ways);
  reset();
  std::vector<StackId> moved(old.size(), 0), path, now;
  for (const StackId way : ways) {
    for (StackId s = way; s != 0 && moved[s] == 0; s = old[s].below) path.push_back(s);
    for (; !path.empty(); path.pop_back())
      moved[path.back()] = push(old[path.back()].top, moved[old[path.back()].below]);
    now.push_back(moved[way]);
  }
  at_.state = intern(std::move(now));
}

void GrammarMatcher::begin_sharing(std::atomic<int64_t>& steps) {
  shared_ = &steps;
  taken_ = 0;
  paused_ = false;
}

void GrammarMatcher::end_sharing() {
  if (shared_ != nullptr && taken_ > 0) *shared_ += taken_;
  shared_ = nullptr;
  paused_ = false;
}

bool GrammarMatcher::pay_alone(int64_t steps) {
  budget_ -= steps;
  if (budget_ < 0) too_long_ = true;
  return budget_ >= 0;
}

bool GrammarMatcher::pay(int64_t steps) {
  if (shared_ != nullptr && (taken_ -= steps) < 0) {
    const int64_t more = std::max(kSharedPiece, -taken_);
    if (shared_->fetch_sub(more) <= 0) {
      *shared_ += more;
      paused_ = true;
      return false;
    }
    taken_ += more;
  }
  return pay_alone(steps);
}

bool GrammarMatcher::ends(uint32_t at) const {
  return elements_[at].type == LLAMA_GRETYPE_END || elements_[at].type == LLAMA_GRETYPE_ALT;
}

/// Whether the set of characters at `at` has one from low to high; `at` is behind the set then.
bool GrammarMatcher::takes(uint32_t& at, uint32_t low, uint32_t high) const {
  const llama_grammar_element* e = &elements_[at];
  if (e->type != LLAMA_GRETYPE_CHAR && e->type != LLAMA_GRETYPE_CHAR_NOT && e->type != LLAMA_GRETYPE_CHAR_ANY)
    return false;
  const bool wanted = e->type != LLAMA_GRETYPE_CHAR_NOT;
  bool found = false;
  do {
    const bool range = e[1].type == LLAMA_GRETYPE_CHAR_RNG_UPPER;
    const uint32_t last = range ? e[1].value : e->value;
    if (e->type == LLAMA_GRETYPE_CHAR_ANY) {
      found = true;
    } else if (wanted) {
      found = found || (e->value <= high && low <= last);
    } else {
      found = found || (e->value <= low && high <= last);  // forbids all of them
    }
    e += range ? 2 : 1;
  } while (e->type == LLAMA_GRETYPE_CHAR_ALT);
  at = static_cast<uint32_t>(e - elements_.data());
  return found == wanted;
}

GrammarMatcher::StackId GrammarMatcher::push(uint32_t top, StackId below) {
  const auto [found, is_new] =
      stack_ids_.try_emplace(uint64_t{top} << 32 | below, static_cast<StackId>(stacks_.size()));
  if (is_new) {
    stacks_.push_back({top, below});
    seen_.push_back(0);
  }
  return found->second;
}

/// Puts what `todo` leads to without a character into `ways`, each once; false if they are too many.
bool GrammarMatcher::open(std::vector<StackId> todo, std::vector<StackId>& ways) {
  const uint64_t search = ++n_searches_;
  while (!todo.empty()) {
    const StackId stack = todo.back();
    todo.pop_back();
    if (seen_[stack] == search) continue;
    seen_[stack] = search;
    if (!pay(kStepsOfAStack)) return false;
    const Stack now = stacks_[stack];
    if (stack == 0 || elements_[now.top].type != LLAMA_GRETYPE_RULE_REF) {
      ways.push_back(stack);
      too_many_ways_ = too_many_ways_ || ways.size() > size_t{kMaxWays};
      if (too_many_ways_) return false;
      continue;
    }
    const StackId rest = ends(now.top + 1) ? now.below : push(now.top + 1, now.below);
    for (uint32_t at = rules_[elements_[now.top].value];; ++at) {
      if (!pay(kStepsOfAStack)) return false;
      todo.push_back(ends(at) ? rest : push(at, rest));
      const uint32_t begin = at;
      while (!ends(at)) ++at;
      if (!pay(at - begin)) return false;
      if (elements_[at].type == LLAMA_GRETYPE_END) break;
    }
  }
  std::sort(ways.begin(), ways.end());
  return true;
}

GrammarMatcher::StateId GrammarMatcher::intern(std::vector<StackId> ways) {
  if (ways.empty()) return kDead;
  const auto [found, is_new] = state_ids_.try_emplace(std::move(ways), static_cast<StateId>(states_.size()));
  if (is_new) {
    pay_alone(kStepsOfAState + static_cast<int64_t>(found->first.size()));
    n_ways_ += found->first.size();
    states_.push_back(std::make_unique<State>());
    states_.back()->ways = found->first;
  }
  return found->second;
}

/// kDead too once something is used up: fault() says so.
GrammarMatcher::StateId GrammarMatcher::next(StateId from, uint32_t character) {
  State& state = *states_[static_cast<size_t>(from)];
  const int64_t budget = budget_;
  const auto find = [&](int64_t price_of_keeping) {
    const StateId to = find_next(from, character);
    if (!paused_) (void)pay(price_of_keeping);
    if (paused_) budget_ = budget;  // it will be looked for again
    return to;
  };
  if (character < 128) {
    if (state.ascii == nullptr) {
      state.ascii = std::make_unique<std::array<StateId, 128>>();
      state.ascii->fill(kUnknown);
    }
    StateId& known = (*state.ascii)[character];
    if (known != kUnknown) return known;
    const StateId to = find(0);
    return paused_ ? kDead : known = to;
  }
  const auto found = state.others.find(character);
  if (found != state.others.end()) return found->second;
  const StateId to = find(kStepsOfAStack);
  if (paused_) return kDead;
  if (!too_long_) state.others.emplace(character, to);
  return to;
}

GrammarMatcher::StateId GrammarMatcher::find_next(StateId from, uint32_t character) {
  State& state = *states_[static_cast<size_t>(from)];
  std::vector<StackId> met, after;
  for (const StackId way : state.ways) {
    if (way == 0) continue;
    const uint32_t top = stacks_[way].top;
    uint32_t behind = top;
    const bool taken = takes(behind, character, character);
    if (!pay(1 + behind - top)) return kDead;
    if (!taken) continue;
    met.push_back(way);
    const StackId below = stacks_[way].below;
    after.push_back(ends(behind) ? below : push(behind, below));
  }
  if (met.empty() || !pay(static_cast<int64_t>(met.size()))) return kDead;
  const auto known = state.by_those_met.find(met);
  if (known != state.by_those_met.end()) return known->second;
  std::vector<StackId> ways;
  if (!open(std::move(after), ways)) return kDead;
  n_ways_ += met.size();
  return state.by_those_met[std::move(met)] = intern(std::move(ways));
}

GrammarMatcher::Place GrammarMatcher::next(Place from, unsigned char byte) {
  constexpr Place kNowhere;
  if (from.state < 0) return kNowhere;
  if (from.missing > 0) {
    if ((byte & 0xC0U) != 0x80U) return kNowhere;
    from.value = from.value << 6 | (byte & 0x3FU);
    --from.missing;
  } else if (byte < 0x80U) {
    from.value = byte;
    from.least = 0;
  } else if (byte >= 0xC0U && byte < 0xF8U) {
    from.missing = byte < 0xE0U ? 1 : byte < 0xF0U ? 2 : 3;
    from.value = byte & (0x3FU >> from.missing);
    from.least = from.missing == 1 ? 0x80 : from.missing == 2 ? 0x800 : 0x10000;
  } else {
    return kNowhere;
  }
  if (from.missing > 0) return from;
  const bool is_surrogate = from.value >= 0xD800 && from.value < 0xE000;
  if (from.value < from.least || from.value > kLastCharacter || is_surrogate) return kNowhere;
  return {next(from.state, from.value), 0, 0, 0};
}

/// Whether a character that is not whole may become one that is allowed.
bool GrammarMatcher::is_possible(const Place& place) {
  if (place.state < 0 || place.missing == 0) return place.state >= 0;
  const int bits = 6 * place.missing;
  const uint32_t low = std::max(place.value << bits, place.least);
  const uint32_t high = std::min((place.value << bits) | ((1U << bits) - 1), kLastCharacter);
  if (low > high) return false;
  for (const StackId way : states_[static_cast<size_t>(place.state)]->ways) {
    if (way == 0) continue;
    uint32_t at = stacks_[way].top;
    const uint32_t top = at;
    if (takes(at, low, high)) return true;
    if (!pay(1 + at - top)) return false;
  }
  return false;
}

Status GrammarMatcher::fault() const {
  if (too_many_ways_)
    return {StatusCode::invalid_argument,
            fmt::format("the grammar is too ambiguous: the answer can go on in more than {} ways", kMaxWays)};
  if (too_long_)
    return {StatusCode::invalid_argument,
            "the grammar is too ambiguous: finding what may come next takes too long"};
  if (paused_) return {StatusCode::cancelled, "the steps that grammars share are used up"};
  return {};
}

Result<bool> GrammarMatcher::allows(std::string_view piece) {
  Place place = at_;
  for (const char c : piece) place = next(place, static_cast<unsigned char>(c));
  const bool possible = !piece.empty() && piece[0] != '\0' && is_possible(place);
  if (Status s = fault(); !s.ok()) return s;
  return possible;
}

Status GrammarMatcher::each_allowed(const SortedPieces& pieces, const std::function<void(Token)>& allowed) {
  std::vector<Place> path{at_};  // after each byte of the last piece
  for (size_t i = 0; i < pieces.size(); ++i) {
    const std::string_view piece = pieces.piece(i);
    path.resize(std::min(path.size(), pieces.shared(i) + 1));
    // Behind a place where nothing is allowed nothing is.
    while (path.size() <= piece.size() && path.back().state >= 0)
      path.push_back(next(path.back(), static_cast<unsigned char>(piece[path.size() - 1])));
    if (path.size() > piece.size() && is_possible(path.back())) allowed(pieces.token(i));
    if (too_many_ways_ || too_long_ || paused_) return fault();
  }
  return {};
}

bool GrammarMatcher::may_end() const {
  return at_.state >= 0 && at_.missing == 0 && states_[static_cast<size_t>(at_.state)]->ways.front() == 0;
}

Status GrammarMatcher::accept(std::string_view piece) {
  Place place = at_;
  for (const char c : piece) place = next(place, static_cast<unsigned char>(c));
  const bool possible = is_possible(place);
  if (Status s = fault(); !s.ok()) return s;
  if (!possible) return {StatusCode::invalid_argument, "the grammar does not allow the token that was drawn"};
  at_ = place;
  return {};
}

}  // namespace narrows
