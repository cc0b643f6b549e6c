// What a RULER question is made of, before it is fitted to a length.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "eval/ruler/words.h"
#include "narrows/text.h"

namespace narrows {

struct RulerRecipe {
  std::vector<ChatMessage> example;  ///< a small worked one before it, question and answer; or none
  /// The message with n units of filler (sentences, blocks, words); longer with every unit, the same for the
  /// same n.
  std::function<std::string(int64_t n)> message;
  std::string lead_in;
  std::vector<std::string> expected;
  int64_t max_tokens = 0;
};

/// The filler's sentences of a user's text, null for generated ones.
using Sentences = std::shared_ptr<const std::vector<std::string>>;

/// Null if there is no such task.
using RecipeMaker = RulerRecipe (*)(int64_t context, RulerRandom random, const Sentences& sentences);
RecipeMaker ruler_recipe(const std::string& task);

// The three families, each in a file of its own.
RulerRecipe variable_tracking(int64_t context, RulerRandom random, const Sentences& sentences);
RulerRecipe common_words(int64_t context, RulerRandom random, const Sentences& sentences);
RulerRecipe frequent_words(int64_t context, RulerRandom random, const Sentences& sentences);

}  // namespace narrows
