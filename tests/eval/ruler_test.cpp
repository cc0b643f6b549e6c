// RULER's tasks as we make them: what is asked for stands in the text, prompts have the length that was asked
// for, the same seed makes the same question, the right answer is worth 1 and none 0.
#include "eval/ruler/ruler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <set>

#include "eval/ruler/words.h"
#include "eval/task/score.h"
#include "support/refusal.h"
#include "support/tiny_model.h"
#include "temp_dir.h"
#include "text/tiny_vocabulary.h"

namespace narrows::testing {
namespace {

/// A token a byte, but for one pair.
const Tokenizer& bytes() {
  static const TempDir dir;
  static const std::unique_ptr<Tokenizer> tokenizer = [] {
    EXPECT_TRUE(TinyVocabulary{}.write(dir.path("v.gguf")));
    auto loaded = Tokenizer::load(dir.path("v.gguf"));
    EXPECT_TRUE(loaded.ok());
    return std::move(*loaded);
  }();
  return *tokenizer;
}

RulerOptions options(const std::vector<std::string>& tasks, int64_t context) {
  RulerOptions o;
  o.tasks = tasks;
  o.contexts = {context};
  o.samples = 3;
  return o;
}

TaskItem item(const RulerOptions& o, int64_t index = 0) {
  const auto items = ruler_items(bytes(), o);
  EXPECT_TRUE(items.ok()) << items.status().message();
  auto made = items->make({o.tasks.at(0), o.contexts.at(0), index});
  EXPECT_TRUE(made.ok()) << made.status().message();
  return made.ok() ? *made : TaskItem{};
}

const std::string& text(const TaskItem& item) { return item.messages.back().content; }

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

class RulerTask : public ::testing::TestWithParam<std::string> {};

TEST_P(RulerTask, HasTheLengthThatWasAskedFor) {
  for (const int64_t context : {2500, 6000, 9000}) {
    const TaskItem made = item(options({GetParam()}, context));
    const auto prompt = item_prompt(bytes(), made, false);
    ASSERT_TRUE(prompt.ok());
    const int64_t room = context - made.max_tokens;
    EXPECT_LE(static_cast<int64_t>(prompt->size()), room);
    EXPECT_GE(static_cast<int64_t>(prompt->size()), room * 9 / 10) << context;
  }
}

TEST_P(RulerTask, TheRightAnswerIsWorthOneAndNoneNothing) {
  for (int64_t index = 0; index < 3; ++index) {
    const TaskItem made = item(options({GetParam()}, 6000), index);
    std::string answer;
    std::set<std::string> distinct;
    for (const std::string& one : made.expected) {
      EXPECT_GE(count(text(made), one), 1U) << one;
      EXPECT_EQ(made.lead_in.find(one), std::string::npos) << one;
      answer += " " + one;
      distinct.insert(one);
    }
    EXPECT_EQ(distinct.size(), made.expected.size());
    EXPECT_EQ(score_answer(Score::contains_all, answer, made.expected), 1);
    EXPECT_EQ(score_answer(Score::contains_all, "", made.expected), 0);
    const std::string one = made.expected.front();
    EXPECT_NEAR(score_answer(Score::contains_all, one, made.expected),
                1.0 / static_cast<double>(made.expected.size()), 1e-12);
  }
}

TEST_P(RulerTask, IsTheSameForTheSameSeedAlone) {
  RulerOptions o = options({GetParam()}, 4000);
  const TaskItem a = item(o), b = item(o), other = item(o, 1);
  EXPECT_EQ(text(a), text(b));
  EXPECT_EQ(a.expected, b.expected);
  EXPECT_NE(text(a), text(other));
  EXPECT_NE(a.expected, other.expected);
  // A question does not depend on how many there are, nor on the other tasks of the run.
  o.samples = 50;
  o.tasks.push_back("fwe");
  EXPECT_EQ(text(a), text(item(o)));
  o.seed = 2;
  EXPECT_NE(a.expected, item(o).expected);
}

INSTANTIATE_TEST_SUITE_P(All, RulerTask, ::testing::ValuesIn(ruler_tasks()));

TEST(Ruler, ThereAreEleven) { EXPECT_EQ(ruler_tasks().size(), 11U); }

TEST(Ruler, NeedlesStandInOneFactEachAndAllOverTheText) {
  double first = 1, last = 0;
  for (int64_t index = 0; index < 12; ++index) {
    const TaskItem made = item(options({"niah_single_2"}, 6000), index);
    ASSERT_EQ(count(text(made), made.expected[0]), 1U);
    const size_t at = text(made).find(made.expected[0]);
    const double depth = static_cast<double>(at) / static_cast<double>(text(made).size());
    first = std::min(first, depth);
    last = std::max(last, depth);
  }
  EXPECT_LT(first, 0.3);
  EXPECT_GT(last, 0.7);
}

TEST(Ruler, HowManyFactsThereAre) {
  const auto facts = [](const char* task) {
    return count(text(item(options({task}, 6000))), "One of the hidden ");
  };
  EXPECT_EQ(facts("niah_single_1"), 1U);
  EXPECT_EQ(facts("niah_single_3"), 1U);
  EXPECT_EQ(facts("niah_multikey_1"), 4U);
  EXPECT_GT(facts("niah_multikey_2"), 50U);  // nothing else is there
  EXPECT_GT(facts("niah_multikey_3"), 30U);
  EXPECT_EQ(facts("niah_multivalue"), 4U);
  EXPECT_EQ(facts("niah_multiquery"), 4U);
  EXPECT_EQ(item(options({"niah_multivalue"}, 6000)).expected.size(), 4U);
  EXPECT_EQ(item(options({"niah_multiquery"}, 6000)).expected.size(), 4U);
  EXPECT_EQ(item(options({"niah_multikey_1"}, 6000)).expected.size(), 1U);
}

TEST(Ruler, VariablesAreSetBeforeTheyAreRead) {
  for (int64_t index = 0; index < 5; ++index) {
    const TaskItem made = item(options({"vt"}, 5000), index);
    ASSERT_EQ(made.expected.size(), 5U);
    size_t at = 0;
    for (size_t i = 0; i < made.expected.size(); ++i) {
      const std::string line =
          "VAR " + made.expected[i] + " = " + (i == 0 ? "" : "VAR " + made.expected[i - 1]);
      const size_t found = text(made).find(line);
      ASSERT_NE(found, std::string::npos) << line;
      EXPECT_GE(found, at);
      at = found;
    }
    EXPECT_EQ(made.messages.size(), 3U);  // a worked example goes before
  }
}

/// Words of a text, and how often each comes.
std::vector<std::pair<size_t, std::string>> counted(const std::string& text) {
  std::map<std::string, size_t> counts;
  std::string word;
  for (const char c : text + " ") {
    if (std::isalpha(static_cast<unsigned char>(c))) {
      word += c;
    } else if (!word.empty()) {
      ++counts[word];
      word.clear();
    }
  }
  std::vector<std::pair<size_t, std::string>> all;
  for (const auto& [w, n] : counts) all.emplace_back(n, w);
  std::sort(all.rbegin(), all.rend());
  return all;
}

TEST(Ruler, CommonWordsAreTheMostCommonAndPartsOfNoOthers) {
  for (const int64_t context : {3000, 9000}) {
    const TaskItem made = item(options({"cwe"}, context));
    const std::string list =
        text(made).substr(text(made).find("1. "), text(made).rfind("\n\n") - text(made).find("1. "));
    const auto words = counted(list);
    ASSERT_EQ(made.expected.size(), 10U);
    for (size_t i = 0; i < 10; ++i) {
      EXPECT_EQ(words[i].first, context < 4096 ? 6U : 30U);
      EXPECT_NE(std::find(made.expected.begin(), made.expected.end(), words[i].second), made.expected.end());
    }
    EXPECT_EQ(words[10].first, context < 4096 ? 1U : 3U);
    for (const auto& [n, word] : words) {
      for (const std::string& common : made.expected) {
        if (word != common) {
          EXPECT_EQ(word.find(common), std::string::npos) << common << " in " << word;
        }
      }
    }
  }
}

TEST(Ruler, FrequentWordsAreTheThreeMostFrequent) {
  for (int64_t index = 0; index < 3; ++index) {
    const TaskItem made = item(options({"fwe"}, 2000 + 3000 * index), index);
    const size_t begin = text(made).find("\n\n"), end = text(made).rfind("\n\n");
    const auto words = counted(text(made).substr(begin, end - begin));
    for (size_t i = 0; i < 3; ++i) EXPECT_EQ(words[i].second, made.expected[i]);
    EXPECT_GT(words[2].first, words[3].first);  // no other is as frequent as the third
  }
}

TEST(Ruler, NeedlesHideInTheUsersText) {
  RulerOptions o = options({"niah_single_2"}, 4000);
  o.filler = "Quokkas eat. Quokkas sleep! Do quokkas dream?";
  const TaskItem made = item(o);
  EXPECT_GT(count(text(made), "Quokkas sleep! Do quokkas dream?"), 20U);
  EXPECT_EQ(count(text(made), made.expected[0]), 1U);
}

TEST(Ruler, KeysAndWordsNeverComeTwice) {
  RulerRandom random(3);
  NewKeys keys;
  NewWords words(random);
  std::set<std::string> seen_keys, seen_words;
  for (int i = 0; i < 30000; ++i) {  // more than there are pairs of words
    EXPECT_TRUE(seen_keys.insert(keys.next(random)).second);
    EXPECT_TRUE(seen_words.insert(words.next(random)).second);
  }
}

TEST(Ruler, AnEarlyEndHasAsManyOfEachTask) {
  RulerOptions o = options({"vt", "fwe"}, 4000);
  o.samples = 2;
  const auto items = ruler_items(bytes(), o);
  const std::vector<ItemId> want = {{"vt", 4000, 0}, {"fwe", 4000, 0}, {"vt", 4000, 1}, {"fwe", 4000, 1}};
  EXPECT_EQ(items->ids, want);
}

TEST(Ruler, Refusals) {
  expect_refusal(ruler_items(bytes(), options({"niah_single_4"}, 4000)).status(),
                 StatusCode::invalid_argument, {"niah_single_4", "niah_single_3", "fwe"});
  RulerOptions o = options({}, 4000);
  o.samples = 0;
  expect_refusal(ruler_items(bytes(), o).status(), StatusCode::invalid_argument, {"sample"});
  o = options({"cwe"}, 400);
  expect_refusal(ruler_items(bytes(), o)->make({"cwe", 400, 0}).status(), StatusCode::invalid_argument,
                 {"cwe", "400", "--context"});
}

}  // namespace
}  // namespace narrows::testing
