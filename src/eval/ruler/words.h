// Words, names and filler of the RULER tasks: all of it of this project's making. Deterministic in the
// generator's state.
#pragma once

#include <cstdint>
#include <random>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace narrows {

/// Whose numbers are the same everywhere; a distribution's would not be.
class RulerRandom {
 public:
  explicit RulerRandom(uint64_t seed) : engine_(seed) {}
  uint64_t below(uint64_t n) { return engine_() % n; }
  double share() { return static_cast<double>(engine_() >> 11) / 9007199254740992.0; }  ///< [0, 1)

  template <class List>
  void shuffle(List& list) {
    for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[below(i)]);
  }

 private:
  std::mt19937_64 engine_;
};

std::span<const std::string_view> plain_nouns();
std::span<const std::string_view> plain_adjectives();

/// "quiet-harbour", never twice; with more words where so many have been given out that it takes long to find
/// another.
class NewKeys {
 public:
  std::string next(RulerRandom& random);

 private:
  std::set<std::string> given_;
};

/// Distinct words in random order: first the plain ones, then compounds of two ("riverlamp").
class NewWords {
 public:
  explicit NewWords(RulerRandom& random);
  std::string next(RulerRandom& random);

 private:
  std::vector<std::string> plain_;
  std::set<std::string> given_;
};

std::string random_digits(RulerRandom& random, int n);           ///< the first is not 0
std::string random_uuid(RulerRandom& random);                    ///< 8-4-4-4-12 hexadecimal digits
std::string random_letters(RulerRandom& random, int n, char a);  ///< a: 'a' or 'A', the first letter

/// One sentence of a generated essay, with a space behind it: grammatical, about nothing.
std::string essay_sentence(RulerRandom& random);
/// What stands between facts where the text is to be monotonous.
std::string_view noise_sentences();

}  // namespace narrows
