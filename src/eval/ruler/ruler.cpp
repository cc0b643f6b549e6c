// Filler is added until the prompt in tokens is as long as it may be: a few steps by the tokens of a unit so
// far.
#include "eval/ruler/ruler.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>

#include "eval/needle.h"
#include "eval/ruler/recipes.h"

namespace narrows {

namespace {

constexpr int64_t kFirstGuess = 32;
constexpr int kMostSteps = 24;

/// Of everything that a question depends on (FNV-1a, then mixed).
uint64_t seed_of(const ItemId& id, uint64_t seed) {
  uint64_t hash = 0xCBF29CE484222325;
  const auto add = [&](uint64_t x) { hash = (hash ^ x) * 0x100000001B3; };
  for (const char c : id.task) add(static_cast<unsigned char>(c));
  for (const uint64_t x : {seed, static_cast<uint64_t>(id.context), static_cast<uint64_t>(id.index)}) {
    add(x);
    hash ^= hash >> 29;
  }
  return hash * 0x9E3779B97F4A7C15;
}

class Fitting {
 public:
  Fitting(const Tokenizer& tokenizer, const RulerRecipe& recipe, const ItemId& id, bool raw)
      : tokenizer_(tokenizer), recipe_(recipe), raw_(raw) {
    item_.id = id;
    item_.messages = recipe.example;
    item_.messages.push_back({"user", ""});
    item_.lead_in = recipe.lead_in;
    item_.expected = recipe.expected;
    item_.max_tokens = recipe.max_tokens;
  }

  Result<TaskItem> run() {
    const int64_t room = item_.id.context - item_.max_tokens;
    const Result<int64_t> bare = tokens(0);
    if (!bare.ok()) return bare.status();
    if (*bare > room) {
      return Status(
          StatusCode::invalid_argument,
          fmt::format("a question of {} has {} tokens without filler and its answer up to {}, but the "
                      "context is {}; raise --context",
                      item_.id.task, *bare, item_.max_tokens, item_.id.context));
    }
    // The units that fit (low), and that do not (high, 0: unknown).
    int64_t low = 0, high = 0, n = kFirstGuess;
    int64_t low_tokens = *bare;
    for (int step = 0; step < kMostSteps && (high == 0 || high > low + 1); ++step) {
      const Result<int64_t> now = tokens(n);
      if (!now.ok()) return now.status();
      const double unit = std::max(0.01, static_cast<double>(*now - *bare) / static_cast<double>(n));
      if (*now <= room) {
        low = n;
        low_tokens = *now;
      } else {
        high = n;
      }
      if (low == n && static_cast<double>(room - *now) < unit) break;
      n = low + std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(room - low_tokens) / unit));
      if (high > 0 && n >= high) n = low + (high - low) / 2;
    }
    item_.messages.back().content = recipe_.message(low);
    return std::move(item_);
  }

 private:
  Result<int64_t> tokens(int64_t n) {
    item_.messages.back().content = recipe_.message(n);
    const Result<std::vector<Token>> prompt = item_prompt(tokenizer_, item_, raw_);
    if (!prompt.ok()) return prompt.status();
    return static_cast<int64_t>(prompt->size());
  }

  const Tokenizer& tokenizer_;
  const RulerRecipe& recipe_;
  bool raw_;
  TaskItem item_;
};

}  // namespace

Result<TaskItems> ruler_items(const Tokenizer& tokenizer, const RulerOptions& options) {
  const std::vector<std::string> tasks = options.tasks.empty() ? ruler_tasks() : options.tasks;
  for (const std::string& task : tasks) {
    if (ruler_recipe(task) != nullptr) continue;
    return Status(StatusCode::invalid_argument, fmt::format("there is no RULER task '{}'; there are {}", task,
                                                            fmt::join(ruler_tasks(), ", ")));
  }
  if (options.contexts.empty() || options.samples < 1)
    return Status(StatusCode::invalid_argument, "RULER needs a context and a sample at least");
  Sentences sentences;
  if (!options.filler.empty()) {
    sentences = std::make_shared<const std::vector<std::string>>(split_sentences(options.filler));
    if (sentences->empty())
      return Status(StatusCode::invalid_argument, "the text to hide needles in has no sentence");
  }
  TaskItems items;
  for (const int64_t context : options.contexts) {
    for (int64_t i = 0; i < options.samples; ++i) {
      for (const std::string& task : tasks) items.ids.push_back({task, context, i});
    }
  }
  items.make = [&tokenizer, sentences, seed = options.seed, raw = options.raw](const ItemId& id) {
    const RulerRecipe recipe = ruler_recipe(id.task)(id.context, RulerRandom(seed_of(id, seed)), sentences);
    return Fitting(tokenizer, recipe, id, raw).run();
  };
  return items;
}

}  // namespace narrows
