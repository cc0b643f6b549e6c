// Where a grammar stands in an answer, and which tokens may come next. libllama's own sampler expands every
// way of a token anew, so that a few nested "maybe"s take minutes; here the stacks share their lower parts,
// equal sets of stacks are one state, what a character leads to is found once, and all of it is paid from a
// budget.
#pragma once

#include <llama-grammar.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "narrows/status.h"
#include "text/vocabulary.h"

namespace narrows {

/// Steps that a grammar may take at once: 0.1 to 0.5 s. Each draw gives back a part of what is gone.
inline constexpr int64_t kGrammarBudget = 100'000'000;
inline constexpr int64_t kGrammarBudgetOfADraw = 5'000'000;

class GrammarMatcher {
 public:
  /// At the beginning of rules[root], which check_rules() has found good.
  GrammarMatcher(const llama_grammar_rules& rules, size_t root);

  /// Before each draw: pays into the budget, and lets go of what only earlier draws needed.
  void begin_draw();
  /// Until end_sharing() steps are taken from `steps` too, which others draw from at the same time. Where
  /// they are used up, what was asked has failed and paused() is true: what was found stays, and the same
  /// question goes on from there. The budget pays for what is done twice once, so that what an answer may
  /// cost does not depend on others.
  void begin_sharing(std::atomic<int64_t>& steps);
  void end_sharing();
  bool paused() const { return paused_; }

  /// Whether the answer may go on with these bytes, which may end within a character. invalid_argument if the
  /// grammar goes on in too many ways or the budget is used up, here and below.
  Result<bool> allows(std::string_view piece);
  /// Calls `allowed` with each token that may come next, in no order; ends of the answer are none of them.
  Status each_allowed(const SortedPieces& pieces, const std::function<void(Token)>& allowed);
  /// Whether the answer may end here.
  bool may_end() const;
  /// Goes on. invalid_argument if the grammar does not allow it.
  Status accept(std::string_view piece);

 private:
  using StackId = uint32_t;  ///< 0: empty
  using StateId = int32_t;
  static constexpr StateId kDead = -1, kUnknown = -2;

  /// What stands on top (an index into elements_), on another stack.
  struct Stack {
    uint32_t top;
    StackId below;
  };
  struct State {
    std::vector<StackId> ways;  ///< in order; each has a character on top or is empty
    std::unique_ptr<std::array<StateId, 128>> ascii;
    std::unordered_map<uint32_t, StateId> others;          ///< by character
    std::map<std::vector<StackId>, StateId> by_those_met;  ///< by the ways that take the character
  };
  /// A state, and the bytes of a character that is not whole.
  struct Place {
    StateId state = kDead;
    uint32_t value = 0;
    uint32_t least = 0;  ///< that a character of so many bytes may be
    int missing = 0;
  };

  void reset();
  bool pay(int64_t steps);
  bool pay_alone(int64_t steps);
  bool ends(uint32_t at) const;
  bool takes(uint32_t& at, uint32_t low, uint32_t high) const;
  StackId push(uint32_t top, StackId below);
  bool open(std::vector<StackId> todo, std::vector<StackId>& ways);
  StateId intern(std::vector<StackId> ways);
  StateId next(StateId from, uint32_t character);
  StateId find_next(StateId from, uint32_t character);
  Place next(Place from, unsigned char byte);
  bool is_possible(const Place& place);
  Status fault() const;

  std::vector<llama_grammar_element> elements_;  ///< of all rules
  std::vector<uint32_t> rules_;                  ///< where each begins
  std::vector<Stack> stacks_;
  std::unordered_map<uint64_t, StackId> stack_ids_;
  std::vector<uint64_t> seen_;  ///< of each stack, the search that met it last
  uint64_t n_searches_ = 0;
  std::vector<std::unique_ptr<State>> states_;
  std::map<std::vector<StackId>, StateId> state_ids_;
  size_t n_ways_ = 0;  ///< of all states
  Place at_;
  int64_t budget_ = kGrammarBudget;
  bool too_many_ways_ = false;
  bool too_long_ = false;
  std::atomic<int64_t>* shared_ = nullptr;
  int64_t taken_ = 0;  ///< of the shared steps, not used yet
  bool paused_ = false;
};

}  // namespace narrows
