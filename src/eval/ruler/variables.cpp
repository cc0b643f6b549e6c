// Variable tracking: assignments that hang together lie scattered in the text, and the question is for all
// variables that one value went to.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "eval/ruler/recipes.h"

namespace narrows {

namespace {

constexpr int kHops = 4;
constexpr int kLetters = 5;
constexpr int kDigits = 5;
constexpr int64_t kExampleBlocks = 4;
constexpr int64_t kAnswerTokens = 48;

struct Chain {
  std::string value;
  std::vector<std::string> names;
  std::vector<std::string> lines;
  std::vector<double> depths;  ///< ascending: a variable is set before it is read

  explicit Chain(RulerRandom& random) : value(random_digits(random, kDigits)) {
    std::set<std::string> taken;
    while (static_cast<int>(names.size()) <= kHops) {
      const std::string name = random_letters(random, kLetters, 'A');
      if (!taken.insert(name).second) continue;
      lines.push_back(names.empty() ? fmt::format("VAR {} = {}. ", name, value)
                                    : fmt::format("VAR {} = VAR {}. ", name, names.back()));
      names.push_back(name);
      depths.push_back(random.share());
    }
    std::sort(depths.begin(), depths.end());
  }

  std::string message(int64_t n) const {
    std::string text =
        "A chain of assignments to variables is scattered over the following text. Follow it: a question "
        "about "
        "it comes behind it.\n\n";
    for (int64_t i = 0; i <= n; ++i) {
      for (size_t l = 0; l < lines.size(); ++l) {
        if (std::llround(depths[l] * static_cast<double>(n)) == i) text += lines[l];
      }
      if (i < n) text += noise_sentences();
    }
    return text + fmt::format("\n\nWhich variables have the value {}, directly or by way of others?", value);
  }

  std::string lead_in() const {
    return fmt::format("By the assignments in the text above, {} variables have the value {}:", names.size(),
                       value);
  }
};

}  // namespace

RulerRecipe variable_tracking(int64_t /*context*/, RulerRandom random, const Sentences& /*sentences*/) {
  const Chain shown(random), chain(random);
  RulerRecipe recipe;
  recipe.example = {{"user", shown.message(kExampleBlocks)},
                    {"assistant", fmt::format("{} {}", shown.lead_in(), fmt::join(shown.names, ", "))}};
  recipe.message = [chain](int64_t n) { return chain.message(n); };
  recipe.lead_in = chain.lead_in();
  recipe.expected = chain.names;
  recipe.max_tokens = kAnswerTokens;
  return recipe;
}

}  // namespace narrows
