// RULER's eight needle tasks are one with five settings: what surrounds the facts, how many there are, and
// what their names and values look like. Also the table of all tasks.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "eval/ruler/recipes.h"

namespace narrows {

namespace {

enum class Around { noise, essay, needles };
enum class Kind { words, digits, uuid };

struct NeedleSettings {
  Around around = Around::essay;
  Kind key = Kind::words;
  Kind value = Kind::digits;
  int n_key = 1;    ///< hidden ones
  int n_asked = 1;  ///< of them
  int n_value = 1;  ///< of each key
};

constexpr int kDigits = 7;
constexpr int64_t kAnswerTokens = 96;

/// Units of filler, made once and in order, so that a longer text begins like a shorter one.
class Units {
 public:
  explicit Units(std::function<std::string()> next) : next_(std::move(next)) {}
  const std::string& at(int64_t i) {
    while (static_cast<int64_t>(made_.size()) <= i) made_.push_back(next_());
    return made_[static_cast<size_t>(i)];
  }

 private:
  std::function<std::string()> next_;
  std::vector<std::string> made_;
};

class NeedleMaker {
 public:
  NeedleMaker(const NeedleSettings& settings, RulerRandom random) : s_(settings), random_(random) {}

  std::string key() { return s_.key == Kind::uuid ? random_uuid(random_) : keys_.next(random_); }
  std::string value() {
    return s_.value == Kind::uuid ? random_uuid(random_) : random_digits(random_, kDigits);
  }
  std::string fact(const std::string& key, const std::string& value) const {
    return fmt::format("One of the hidden {}s of {} is {}. ", noun(), key, value);
  }
  const char* noun() const { return s_.value == Kind::uuid ? "code" : "number"; }
  RulerRandom& random() { return random_; }

 private:
  NeedleSettings s_;
  RulerRandom random_;
  NewKeys keys_;
};

std::string list_of(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) text += i + 1 == names.size() ? " and " : ", ";
    text += names[i];
  }
  return text;
}

RulerRecipe needles(const NeedleSettings& settings, RulerRandom random, const Sentences& sentences) {
  auto maker = std::make_shared<NeedleMaker>(settings, random);
  struct Hidden {
    std::string fact;
    double depth;
  };
  std::vector<Hidden> hidden;
  std::vector<std::string> asked;
  RulerRecipe recipe;
  for (int k = 0; k < settings.n_key; ++k) {
    const std::string key = maker->key();
    if (k < settings.n_asked) asked.push_back(key);
    for (int v = 0; v < settings.n_value; ++v) {
      const std::string value = maker->value();
      if (k < settings.n_asked) recipe.expected.push_back(value);
      hidden.push_back({maker->fact(key, value), maker->random().share()});
    }
  }
  const size_t first = sentences ? maker->random().below(sentences->size()) : 0;
  const auto units = std::make_shared<Units>([=, n = first]() mutable -> std::string {
    switch (settings.around) {
      case Around::noise:
        return std::string(noise_sentences());
      case Around::needles: {
        const std::string key = maker->key();
        return maker->fact(key, maker->value());
      }
      case Around::essay:
        break;
    }
    return sentences ? (*sentences)[n++ % sentences->size()] : essay_sentence(maker->random());
  });
  const bool several = recipe.expected.size() > 1;
  const std::string what =
      fmt::format("hidden {}{} of {}", maker->noun(), several ? "s" : "", list_of(asked));
  const std::string noun = maker->noun();
  recipe.message = [=](int64_t n) {
    std::string text = fmt::format(
        "Hidden {}s are scattered over the following text. Keep them in mind: a question about them comes "
        "behind it.\n\n",
        noun);
    for (int64_t i = 0; i <= n; ++i) {
      for (const Hidden& h : hidden) {
        if (std::llround(h.depth * static_cast<double>(n)) == i) text += h.fact;
      }
      if (i < n) text += units->at(i);
    }
    return text + fmt::format("\n\nWhat {} the {} in the text above?", several ? "are" : "is", what);
  };
  recipe.lead_in = fmt::format("The {} in the text above {}", what, several ? "are" : "is");
  recipe.max_tokens = kAnswerTokens;
  return recipe;
}

/// RULER's table of the eight.
RulerRecipe single_1(int64_t, RulerRandom r, const Sentences& s) {
  return needles({Around::noise, Kind::words, Kind::digits, 1, 1, 1}, r, s);
}
RulerRecipe single_2(int64_t, RulerRandom r, const Sentences& s) {
  return needles({Around::essay, Kind::words, Kind::digits, 1, 1, 1}, r, s);
}
RulerRecipe single_3(int64_t, RulerRandom r, const Sentences& s) {
  return needles({Around::essay, Kind::words, Kind::uuid, 1, 1, 1}, r, s);
}
RulerRecipe multikey_1(int64_t, RulerRandom r, const Sentences& s) {
  return needles({Around::essay, Kind::words, Kind::digits, 4, 1, 1}, r, s);
}
RulerRecipe multikey_2(int64_t, RulerRandom r, const Sentences& s) {
  return needles({Around::needles, Kind::words, Kind::digits, 1, 1, 1}, r, s);
}
RulerRecipe multikey_3(int64_t, RulerRandom r, const Sentences& s) {
  return needles({Around::needles, Kind::uuid, Kind::uuid, 1, 1, 1}, r, s);
}
RulerRecipe multivalue(int64_t, RulerRandom r, const Sentences& s) {
  return needles({Around::essay, Kind::words, Kind::digits, 1, 1, 4}, r, s);
}
RulerRecipe multiquery(int64_t, RulerRandom r, const Sentences& s) {
  return needles({Around::essay, Kind::words, Kind::digits, 4, 4, 1}, r, s);
}

constexpr std::array<std::pair<const char*, RecipeMaker>, 11> kTasks = {{{"niah_single_1", single_1},
                                                                         {"niah_single_2", single_2},
                                                                         {"niah_single_3", single_3},
                                                                         {"niah_multikey_1", multikey_1},
                                                                         {"niah_multikey_2", multikey_2},
                                                                         {"niah_multikey_3", multikey_3},
                                                                         {"niah_multivalue", multivalue},
                                                                         {"niah_multiquery", multiquery},
                                                                         {"vt", variable_tracking},
                                                                         {"cwe", common_words},
                                                                         {"fwe", frequent_words}}};

}  // namespace

std::vector<std::string> ruler_tasks() {
  std::vector<std::string> names;
  for (const auto& [name, maker] : kTasks) names.emplace_back(name);
  return names;
}

RecipeMaker ruler_recipe(const std::string& task) {
  for (const auto& [name, maker] : kTasks) {
    if (task == name) return maker;
  }
  return nullptr;
}

}  // namespace narrows
