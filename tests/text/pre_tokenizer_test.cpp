// Words of every kind of vocabulary: the same as libllama's, for any length of text.
#include "text/pre_tokenizer.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <random>

#include "narrows/text.h"
#include "support/sanitized.h"
#include "text/tiny_vocabulary.h"
#include "text/word_regex.h"

namespace narrows {
namespace {

using Words = std::vector<std::string>;

/// tokenizer.ggml.pre of files in circulation, every expression of libllama's among them.
const char* const kKinds[] = {
    "default",     "llama-bpe",   "llama3",   "jais-2",    "deepseek-llm",  "deepseek-coder",
    "deepseek-v3", "falcon",      "mpt",      "starcoder", "gpt-2",         "smollm",
    "refact",      "command-r",   "qwen2",    "qwen35",    "stablelm2",     "olmo",
    "poro-chat",   "bloom",       "viking",   "tekken",    "chameleon",     "gpt-4o",
    "minimax-m2",  "tiny_aya",    "kimi-k2",  "superbpe",  "bailingmoe",    "seed-coder",
    "ufakzeka",    "grok-2",      "afmoe",    "laguna",    "exaone-moe",    "exaone4",
    "minicpm5",    "youtu",       "spark2_5", "hunyuan",   "hunyuan-dense", "granite-embed-multi-97m",
    "smaug-bpe",   "chatglm-bpe", "dbrx",     "jais",      "trillion",      "codeshell",
};

Words g_seen;

/// The expressions that libllama cuts texts of this kind with.
Words expressions_of(const std::string& kind) {
  const auto path = std::filesystem::path(::testing::TempDir()) / ("pre_" + kind + ".gguf");
  testing::TinyVocabulary vocabulary;
  vocabulary.pre = kind;
  if (!vocabulary.write(path.string())) return {};
  auto tokenizer = Tokenizer::load(path.string());
  std::filesystem::remove(path);
  if (!tokenizer.ok()) return {};
  g_seen.clear();
  watch_expressions([](const Words& e) { g_seen = e; });
  EXPECT_TRUE((*tokenizer)->encode("a", false, false).ok());
  watch_expressions(nullptr);
  return g_seen;
}

std::map<Words, std::string> kinds_by_expressions() {
  std::map<Words, std::string> kinds;
  for (const char* kind : kKinds) kinds.emplace(expressions_of(kind), kind);
  return kinds;
}

/// A short text out of what expressions tell apart, with runs of like characters.
std::string some_text(std::mt19937& random) {
  static const char* const kPieces[] = {"a",
                                        "z",
                                        "A",
                                        "Z",
                                        "e",
                                        "M",
                                        "0",
                                        "1",
                                        "9",
                                        " ",
                                        "  ",
                                        "\n",
                                        "\r",
                                        "\t",
                                        "\v",
                                        "'",
                                        "'s",
                                        "'LL",
                                        "'Re",
                                        "'d",
                                        ".",
                                        ",",
                                        "!",
                                        "/",
                                        "-",
                                        "[",
                                        "]",
                                        "`",
                                        "^",
                                        "$",
                                        "+",
                                        "<",
                                        "|",
                                        "~",
                                        "(",
                                        "IMGIMGABZ",
                                        "<sentinel:12>",
                                        "é",
                                        "ß",
                                        "Ж",
                                        "ж",
                                        "ſ",
                                        "中",
                                        "文",
                                        "か",
                                        "カ",
                                        "한",
                                        "ㄱ",
                                        "ㄅ",
                                        "́",
                                        "ि",
                                        "क",
                                        "๑",
                                        "²",
                                        "Ⅷ",
                                        "。",
                                        "，",
                                        "…",
                                        "“",
                                        "€",
                                        "∑",
                                        "😀",
                                        "\u00A0",
                                        "\u3000",
                                        "\u0085",
                                        "\u2028",
                                        "\u200B",
                                        "_",
                                        "\\",
                                        "{"};
  std::string text;
  const int n = 1 + static_cast<int>(random() % 24);
  for (int i = 0; i < n; ++i) {
    const char* piece = kPieces[random() % std::size(kPieces)];
    const int times = random() % 8 == 0 ? static_cast<int>(random() % 600) : 1;
    for (int t = 0; t < times; ++t) text += piece;
  }
  return text;
}

TEST(PreTokenizer, WordsAreLibllamas) {
  const std::map<Words, std::string> kinds = kinds_by_expressions();
  EXPECT_FALSE(kinds.contains({}));  // a kind that libllama does not know
  EXPECT_GE(kinds.size(), 28U);
  for (const auto& [expressions, kind] : kinds) {
    std::mt19937 random(7);
    for (int i = 0; i < (kSanitized ? 40 : 400); ++i) {
      const std::string text = some_text(random);
      ASSERT_EQ(split_words(text, expressions, true),
                [&] {
                  Words words = library_split_words(text, expressions, true);
                  std::erase(words, "");  // of matches without a length
                  return words;
                }())
          << kind << ": " << text;
    }
  }
}

TEST(PreTokenizer, KnowsEveryExpressionThatLibllamaHasNoLoopFor) {
  for (const char* kind : kKinds) {
    for (const std::string& expression : expressions_of(kind)) {
      const bool odd =
          expression.find("(?i:") != std::string::npos || expression.find("\\b") != std::string::npos ||
          expression.find("{Han}") != std::string::npos || expression.find("AFMoE") != std::string::npos;
      if (!odd) {
        EXPECT_NE(WordRegex::compile(expression), nullptr) << kind << ": " << expression;
      }
    }
  }
}

/// Long texts of each sort, whose runs end otherwise than they begin: std::regex overflows the stack at
/// 27,000 like characters.
TEST(PreTokenizer, LongRunsEndNothing) {
  for (const auto& [expressions, kind] : kinds_by_expressions()) {
    for (const std::string& piece :
         thinned(Words{"a", "A", "7", " ", "\n", "!", "é", "中", " a", "aA", "'s", "\r\n", "́"})) {
      std::string text;
      while (text.size() < (kSanitized ? 10'000 : 60'000)) text += piece;
      for (const std::string& end : Words{"", "x", "1", " ", "\n"}) {
        size_t n = 0;
        for (const std::string& word : split_words(text + end, expressions, false)) n += word.size();
        ASSERT_EQ(n, text.size() + end.size()) << kind << ": " << piece;
      }
    }
  }
}

/// Two million characters that an expression tries in vain from each of them: minutes with a time that grows
/// with the square, and the test's limit is five.
TEST(PreTokenizer, TimeDoesNotGrowWithTheSquare) {
  for (const auto& [expressions, kind] : kinds_by_expressions()) {
    const size_t many = kSanitized ? 40'000 : 2'000'000;
    for (const std::string& text :
         {std::string(many, ' ') + "1", std::string(many, '1') + "a", std::string(many, 'A') + "1"}) {
      size_t n = 0;
      for (const std::string& word : split_words(text, expressions, false)) n += word.size();
      ASSERT_EQ(n, text.size()) << kind;
    }
  }
}

TEST(WordRegex, UnknownExpressionsAreLeftToOthers) {
  for (const char* expression :
       {"a++", "a*?", "(a*)*", "\\bx", "\\w", "a{2,1}", "[b-a]", "(?i:a)", "(a", "a)", "[a", "\\p{Han}",
        "a|*", "[]", ".", "^a", "a{5000}", "((((a{90}){90}){90}){90})"}) {
    EXPECT_EQ(WordRegex::compile(expression), nullptr) << expression;
  }
}

TEST(WordRegex, MatchesAsEcmaScriptDoes) {
  const auto split = [](const char* expression, const std::string& text) {
    const auto regex = WordRegex::compile(expression);
    EXPECT_NE(regex, nullptr) << expression;
    std::vector<uint32_t> units(text.begin(), text.end());
    std::vector<size_t> lengths;
    regex->split(units, lengths);
    return lengths;
  };
  using L = std::vector<size_t>;
  EXPECT_EQ(split("a|ab", "ab"), (L{1, 1}));  // the first alternative, not the longest
  EXPECT_EQ(split("a+b", "aaab"), (L{4}));
  EXPECT_EQ(split("a+ab", "xaaab"), (L{1, 4}));  // gives one back
  EXPECT_EQ(split("(?:ab?)+c", "ababac"), (L{6}));
  EXPECT_EQ(split("\\s+(?!\\S)", "   x  "), (L{2, 2, 2}));
  EXPECT_EQ(split("(?=[a-z])[^m]", "lmn"), (L{1, 1, 1}));
  EXPECT_EQ(split("a{2,3}", "aaaaa"), (L{3, 2}));
  EXPECT_EQ(split("\\s+$", "  x  "), (L{3, 2}));
  EXPECT_EQ(split("(?=b)", "aba"), (L{1, 2}));  // no length
}

}  // namespace
}  // namespace narrows
