// Common and frequent words: nothing is hidden, all of the text has to be counted.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "eval/ruler/recipes.h"

namespace narrows {

namespace {

constexpr int kCommon = 10;
/// Of a text of this many tokens on the common words come 30 times and the others 3 times, else 6 times and
/// once.
constexpr int64_t kLongFrom = 4096;
constexpr int64_t kLeastOthers = 10;
constexpr int64_t kCommonAnswerTokens = 96;

constexpr int kFrequent = 3;
constexpr int kCodedLetters = 6;
constexpr double kZeta2 = 1.6449340668482264;  ///< sum of 1/k^2
constexpr int64_t kLeastCoded = 100;           ///< fewer, and the third and the fourth come as often
constexpr int64_t kLeastVocabulary = 20;
constexpr int64_t kTokensACode = 50;  ///< of context: so many codes are there
constexpr int64_t kFrequentAnswerTokens = 48;

class WordList {
 public:
  WordList(RulerRandom random, int n_often, int n_seldom)
      : random_(random), words_(random_), n_often_(n_often), n_seldom_(n_seldom) {
    for (int i = 0; i < kCommon; ++i) common_.push_back(words_.next(random_));
    // An answer that names "golden" must not have named "old": no common word is a part of another one.
    for (std::string& word : common_) {
      while (is_part_of_common(word)) word = words_.next(random_);
    }
  }

  std::string message(int64_t n) {
    n += kLeastOthers;
    while (static_cast<int64_t>(others_.size()) < n) {
      std::string word = words_.next(random_);
      if (std::none_of(common_.begin(), common_.end(),
                       [&](const std::string& c) { return word.find(c) != std::string::npos; }))
        others_.push_back(std::move(word));
    }
    std::vector<std::string_view> all;
    for (const std::string& word : common_) all.insert(all.end(), static_cast<size_t>(n_often_), word);
    for (int64_t i = 0; i < n; ++i)
      all.insert(all.end(), static_cast<size_t>(n_seldom_), others_[static_cast<size_t>(i)]);
    RulerRandom order(static_cast<uint64_t>(n));
    order.shuffle(all);
    std::string text = "Below is a numbered list of words, some of which come much more often than others. ";
    text += "Keep in mind those that come most often.\n\n";
    for (size_t i = 0; i < all.size(); ++i) text += fmt::format("{}. {} ", i + 1, all[i]);
    return text + fmt::format("\n\nWhich {} words come most often in the list?", kCommon);
  }

  static std::string lead_in() {
    return fmt::format("The {} words that come most often in the list are:", kCommon);
  }
  const std::vector<std::string>& common() const { return common_; }

 private:
  bool is_part_of_common(const std::string& word) const {
    return std::any_of(common_.begin(), common_.end(), [&](const std::string& other) {
      return &other != &word &&
             (other.find(word) != std::string::npos || word.find(other) != std::string::npos);
    });
  }

  RulerRandom random_;
  NewWords words_;
  int n_often_, n_seldom_;
  std::vector<std::string> common_, others_;
};

}  // namespace

RulerRecipe common_words(int64_t context, RulerRandom random, const Sentences& /*sentences*/) {
  const bool is_long = context >= kLongFrom;
  WordList shown(random, 4, 1);
  random.below(2);  // another list than the example's
  auto list = std::make_shared<WordList>(random, is_long ? 30 : 6, is_long ? 3 : 1);
  RulerRecipe recipe;
  recipe.example = {
      {"user", shown.message(0)},
      {"assistant", fmt::format("{} {}", WordList::lead_in(), fmt::join(shown.common(), ", "))}};
  recipe.message = [list](int64_t n) { return list->message(n); };
  recipe.lead_in = WordList::lead_in();
  recipe.expected = list->common();
  recipe.max_tokens = kCommonAnswerTokens;
  return recipe;
}

RulerRecipe frequent_words(int64_t context, RulerRandom random, const Sentences& /*sentences*/) {
  const int64_t n_code = std::max(kLeastVocabulary, context / kTokensACode);
  std::vector<std::string> codes;
  while (static_cast<int64_t>(codes.size()) < n_code) {
    std::string code = random_letters(random, kCodedLetters, 'a');
    if (std::find(codes.begin(), codes.end(), code) == codes.end()) codes.push_back(std::move(code));
  }
  RulerRecipe recipe;
  recipe.expected.assign(codes.begin(), codes.begin() + kFrequent);
  const uint64_t seed = random.below(uint64_t{1} << 62);
  recipe.message = [codes, seed](int64_t n) {
    n += kLeastCoded;
    // The k-th comes in proportion to 1/k^2; dots are the first, which does not count.
    const auto count = [n](size_t k) {
      return static_cast<size_t>(static_cast<double>(n) / kZeta2 / static_cast<double>(k * k));
    };
    std::vector<std::string_view> all(count(1), "....");
    for (size_t i = 0; i < codes.size(); ++i)
      all.insert(all.end(), std::max<size_t>(1, count(i + 2)), codes[i]);
    RulerRandom order(seed ^ static_cast<uint64_t>(n));
    order.shuffle(all);
    return fmt::format(
        "Below is a text in code words. Dots mean nothing. Keep in mind which code words come most "
        "often.\n\n{}\n\n"
        "Which {} code words come most often in the text? Dots do not count.",
        fmt::join(all, " "), kFrequent);
  };
  recipe.lead_in = fmt::format("The {} code words that come most often are:", kFrequent);
  recipe.max_tokens = kFrequentAnswerTokens;
  return recipe;
}

}  // namespace narrows
