// The tokens that a grammar allows: the same that libllama's sampler allows, in a bounded time.
#include "sample/grammar_matcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <limits>
#include <random>
#include <set>

#include "narrows/sampling.h"
#include "sample/grammar.h"
#include "temp_dir.h"
#include "text/tiny_vocabulary.h"
#include "text/vocabulary.h"

namespace narrows {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

/// The bytes, the end (256), "he" (257), and words of many letters that real vocabularies have.
const Tokenizer& tokenizer() {
  static const testing::TempDir dir;
  static const std::unique_ptr<Tokenizer> loaded = [] {
    testing::TinyVocabulary vocabulary;
    for (size_t n = 2; n <= 64; n *= 2) vocabulary.more.emplace_back(std::string(n, 'a'), 1);
    for (const char* word :
         {"ab", "aba", "abc", "\":", "{\"", "[[", "]]", "true", "null", "12", "123", "\\\""})
      vocabulary.more.emplace_back(word, 1);
    const auto bytes = [](std::initializer_list<int> list) {
      std::string word;
      for (const int byte : list) word += testing::gpt2_character(byte);
      return word;
    };
    // A character, a part of one behind a letter, the rest of one before a letter.
    vocabulary.more.emplace_back(bytes({0xE2, 0x82, 0xAC}), 1);
    vocabulary.more.emplace_back(bytes({'a', 0xE2, 0x82}), 1);
    vocabulary.more.emplace_back(bytes({0x82, 0xAC, 'a'}), 1);
    EXPECT_TRUE(vocabulary.write(dir.path("v.gguf")));
    return std::move(Tokenizer::load(dir.path("v.gguf")).value());
  }();
  return *loaded;
}

/// Its own recursion is in the tests alone.
struct Libllama {
  explicit Libllama(const std::string& gbnf) {
    EXPECT_TRUE(parser.parse(gbnf.c_str()));
    auto rules = parser.c_rules();
    grammar.reset(llama_grammar_init_impl(nullptr, rules.data(), rules.size(), parser.symbol_ids.at("root")));
  }
  bool allows(const std::string& text) const {
    // As llama_grammar_apply_impl() asks, with the characters that came before and no vocabulary.
    std::unique_ptr<llama_grammar, decltype(&llama_grammar_free_impl)> copy(
        llama_grammar_clone_impl(*grammar), llama_grammar_free_impl);
    try {
      llama_grammar_accept_str(*copy, text);
      return true;
    } catch (const std::runtime_error&) {
      return false;
    }
  }
  bool may_end() const {
    for (const auto& stack : llama_grammar_get_stacks(grammar.get()))
      if (stack.empty()) return true;
    return false;
  }
  llama_grammar_parser parser;
  std::unique_ptr<llama_grammar, decltype(&llama_grammar_free_impl)> grammar{nullptr,
                                                                             llama_grammar_free_impl};
};

TEST(GrammarMatcher, AllowsWhatLibllamaAllows) {
  const SortedPieces& pieces = sorted_pieces(tokenizer());
  const auto json = grammar_of_schema("{}");
  const auto person = grammar_of_schema(
      R"({"type":"object","properties":{"ab":{"type":"string","maxLength":3},"c":{"type":"array","items":{
          "type":"integer","minimum":-5,"maximum":123}}}})");
  ASSERT_TRUE(json.ok() && person.ok());
  for (const std::string& gbnf : std::vector<std::string>{
           *json, *person, "root ::= \"a\"{3,9} (\"b\" | \"c\" root)?", "root ::= (\"a\"? \"b\"?){4} [^a-c]*",
           "root ::= [a-c\\u20ac] . root | \"ab\" | ",
           "root ::= \"[\" root \"]\" | \"[[\" root \"]]\" | \"a\"*"}) {
    std::mt19937 random(7);
    for (int walk = 0; walk < 6; ++walk) {
      const auto ours = make_grammar(gbnf);
      ASSERT_TRUE(ours.ok()) << ours.status().message();
      const Libllama theirs(gbnf);
      for (int step = 0; step < 12; ++step) {
        (*ours)->begin_draw();
        std::set<Token> allowed;
        ASSERT_TRUE((*ours)->each_allowed(pieces, [&](Token t) { allowed.insert(t); }).ok());
        EXPECT_EQ((*ours)->may_end(), theirs.may_end());
        std::vector<std::string> whole;
        for (size_t i = 0; i < pieces.size(); ++i) {
          const std::string piece(pieces.piece(i));
          const Result<bool> one = (*ours)->allows(piece);
          ASSERT_TRUE(one.ok());
          EXPECT_EQ(*one, allowed.contains(pieces.token(i))) << piece;
          const bool ascii = std::all_of(piece.begin(), piece.end(), [](char c) { return c > 0; });
          if (!ascii && piece != "€") continue;
          EXPECT_EQ(*one, theirs.allows(piece)) << gbnf << ": " << piece;
          if (*one) whole.push_back(piece);
        }
        if (whole.empty()) break;
        const std::string& next = whole[random() % whole.size()];
        ASSERT_TRUE((*ours)->accept(next).ok());
        llama_grammar_accept_str(*theirs.grammar, next);
      }
    }
  }
}

TEST(GrammarMatcher, TakesCharactersInParts) {
  const auto grammar = make_grammar("root ::= \"a\" [€-₿] \"a\" | \"é\"");
  ASSERT_TRUE(grammar.ok());
  GrammarMatcher& g = **grammar;
  const auto allows = [&](const char* bytes) { return g.allows(bytes).value(); };
  EXPECT_TRUE(allows("a\xE2\x82") && allows("\xC3") && allows("a\xE2"));
  EXPECT_FALSE(allows("a\xE2\x83") || allows("\xC2") || allows("\x82") || allows("\xC1") ||
               allows("a\xE0\x82"));
  ASSERT_TRUE(g.accept("a\xE2\x82").ok());
  EXPECT_FALSE(g.may_end());
  EXPECT_TRUE(allows("\xAC") && allows("\xBF"
                                       "a"));
  EXPECT_FALSE(allows("a") || allows("\x9F") || allows("\xACx") || allows("\xE2"));
  ASSERT_TRUE(g.accept("\xAC"
                       "a")
                  .ok());
  EXPECT_TRUE(g.may_end());
  EXPECT_FALSE(allows("a"));
}

/// Draws n tokens; returns the longest draw in seconds and the error that ended it.
std::pair<double, std::string> draw(const std::string& gbnf, const std::string& first, int n) {
  SamplerOptions options;
  options.temperature = 0;
  options.grammar = gbnf;
  const auto sampler = Sampler::create(options, &tokenizer());
  EXPECT_TRUE(sampler.ok()) << sampler.status().message();
  std::vector<float> logits(static_cast<size_t>(tokenizer().n_vocab()), 0.0F);
  logits['%'] = 9;  // what the model wants is not allowed: all tokens are looked at
  for (const char c : first) logits[static_cast<unsigned char>(c)] = 5;
  double longest = 0;
  for (int i = 0; i < n; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const Result<Token> token = (*sampler)->sample(logits);
    if (token.ok()) (*sampler)->accept(*token);
    longest =
        std::max(longest, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    if (!token.ok()) return {longest, token.status().message()};
    if (tokenizer().is_end(*token)) break;
  }
  return {longest, ""};
}

// "^(a?){100}$" took 15 s for a token, and 50 more each 30 times as long.
TEST(GrammarMatcher, NoDrawTakesLong) {
  for (const int n : {50, 100, 200, 500, 2000}) {
    const auto grammar =
        grammar_of_schema(R"({"type":"string","pattern":"^(a?){)" + std::to_string(n) + R"(}$"})");
    if (n > 100 && !grammar.ok()) continue;  // refused before it is drawn from
    ASSERT_TRUE(grammar.ok()) << grammar.status().message();
    const auto [longest, error] = draw(*grammar, "a", 30);
    std::cerr << n << " " << longest << " " << error << "\n";
    EXPECT_LT(longest, 2) << n;
    EXPECT_EQ(error, "") << n;
  }
  for (const char* gbnf :
       {"root ::= (\"a\"? \"a\"? \"a\"? \"a\"?){200}", "root ::= [a-z]{0,500}[a-z]{0,500}[a-z]{0,500}",
        "root ::= ((\"a\" | \"aa\")? (\"a\" | \"ab\"){0,30}){60}", "root ::= (\"a\"{0,30}){0,60}",
        "root ::= x{0,300}\nx ::= y{0,9}\ny ::= \"a\"? \"a\"{0,5}",
        "root ::= \"a\" root \"b\" | \"a\" root \"c\" | \"aa\" root | \"a\"",
        "root ::= a a a a a a\na ::= (\"a\"? \"a\"?)*"}) {
    if (!check_grammar(gbnf).ok()) continue;  // refused before it is drawn from
    const auto [longest, error] = draw(gbnf, "a", 60);
    std::cerr << gbnf << " " << longest << " " << error << "\n";
    EXPECT_LT(longest, 2) << gbnf;
    EXPECT_THAT(error, AnyOf("", HasSubstr("too ambiguous"))) << gbnf;
  }
}

/// With all pairs of letters as tokens.
std::unique_ptr<Tokenizer> pairs_of_letters(const std::string& letters) {
  const testing::TempDir dir;
  testing::TinyVocabulary vocabulary;
  for (const char a : letters)
    for (const char b : letters) vocabulary.more.emplace_back(std::string{a, b}, 1);
  std::erase_if(vocabulary.more, [](const auto& word) { return word.first == "he"; });
  EXPECT_TRUE(vocabulary.write(dir.path("v.gguf")));
  return std::move(Tokenizer::load(dir.path("v.gguf")).value());
}

std::string all_letters() {
  std::string letters;
  for (char c = 'A'; c <= 'Z'; ++c) letters += {c, static_cast<char>(c - 'A' + 'a')};
  return letters;
}

/// Each character leaves another half of n ways, which can be walked no faster than one by one.
SamplerOptions ways_of_letters(int n) {
  std::mt19937 random(1);
  SamplerOptions options;
  options.temperature = 0;
  options.grammar = "root ::= ";
  for (int i = 0; i < n; ++i) {
    options.grammar += i > 0 ? " | " : "";
    for (int place = 0; place < 3; ++place) {
      options.grammar += "[";
      for (const char c : all_letters())
        if (random() % 2 == 0) options.grammar += c;
      options.grammar += "]";
    }
  }
  return options;
}

// docs/server_api.md: "A grammar that goes on in more than 4,000 ways at one place, or whose next token takes
// more than about half a second to find, ends the request with an error"
TEST(GrammarMatcher, ADrawEndsWithItsBudget) {
  const auto loaded = pairs_of_letters(all_letters());
  const auto sampler = Sampler::create(ways_of_letters(3000), loaded.get());
  ASSERT_TRUE(sampler.ok()) << sampler.status().message();
  std::vector<float> logits(static_cast<size_t>(loaded->n_vocab()), 0.0F);
  logits['%'] = 9;
  const auto begin = std::chrono::steady_clock::now();
  const Result<Token> token = (*sampler)->sample(logits);
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(), 2);
  EXPECT_EQ(token.status().code(), StatusCode::invalid_argument);
  EXPECT_THAT(token.status().message(), HasSubstr("takes too long"));
  EXPECT_FALSE((*sampler)->sample(logits).ok());  // it stays so
}

// Sixty-four slots could each spend a whole budget in one step of the engine.
// docs/server_api.md: "The grammars of all slots share what a step may take"
TEST(GrammarMatcher, DrawsOfAStepShareTheirSteps) {
  const auto loaded = pairs_of_letters(all_letters());
  std::vector<float> logits(static_cast<size_t>(loaded->n_vocab()), 0.0F);
  logits['%'] = 9;
  for (const int n : {200, 3000}) {  // one that comes to its end, one that does not
    const auto alone = Sampler::create(ways_of_letters(n), loaded.get());
    const Result<Token> wanted = (*alone)->sample(logits);
    EXPECT_EQ(wanted.ok(), n == 200);
    constexpr int kSlots = 8;
    std::vector<std::unique_ptr<Sampler>> slots;
    for (int i = 0; i < kSlots; ++i)
      slots.push_back(std::move(Sampler::create(ways_of_letters(n), loaded.get()).value()));
    constexpr int64_t kSteps = 1'000'000;
    std::vector<bool> done(kSlots);
    int n_put_off = 0, n_rounds = 0;
    for (size_t next = 0; next < kSlots && n_rounds < 10'000; ++n_rounds) {
      std::atomic<int64_t> steps{kSteps};
      for (size_t i = 0; i < kSlots; ++i) {
        if (done[i]) continue;
        const Result<std::optional<Token>> token = slots[i]->sample(logits, steps);
        done[i] = !token.ok() || token->has_value();
        n_put_off += done[i] ? 0 : 1;
        if (!done[i]) continue;
        EXPECT_EQ(token.ok(), wanted.ok());
        EXPECT_EQ(token.ok() ? **token : -1, wanted.ok() ? *wanted : -1);
        EXPECT_EQ(token.status().message(), wanted.status().message());
      }
      EXPECT_GT(steps, -1'000'000);  // one piece of work beyond
      while (next < kSlots && done[next]) ++next;
    }
    EXPECT_LT(n_rounds, 10'000) << n;
    EXPECT_GT(n_put_off, kSlots) << n;
    std::cerr << n << " ways: " << n_rounds << " rounds\n";
  }
}

// 40,000 brackets deep, which nothing grows with but the stack itself.
TEST(GrammarMatcher, DeepStacksAreShared) {
  const auto grammar = make_grammar("root ::= \"[\" root \"]\" | \"a\"");
  ASSERT_TRUE(grammar.ok());
  const std::string many(1000, '[');
  for (int i = 0; i < 40; ++i) {
    (*grammar)->begin_draw();
    ASSERT_TRUE((*grammar)->accept(many).ok()) << i;
  }
  EXPECT_TRUE((*grammar)->allows("a]").value());
  EXPECT_FALSE((*grammar)->allows("]").value());
}

}  // namespace
}  // namespace narrows
