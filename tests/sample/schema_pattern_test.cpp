// Patterns of schemas against another reader of the same regular expressions: a string that a grammar lets
// pass is one in which std::regex finds the pattern, and the other way round.
#include "sample/schema_pattern.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <regex>
#include <string>

#include "sample/grammar.h"

namespace narrows {
namespace {

using ::testing::HasSubstr;

std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
      case '\\':
        out += '\\';
        out += c;
        break;
      case '\n':
        out += "\\n";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        out += c;
    }
  }
  return out + "\"";
}

std::string grammar_of(const std::string& pattern) {
  ::testing::internal::CaptureStderr();
  const Result<std::string> grammar =
      grammar_of_schema(R"({"type":"string","pattern":)" + json_string(pattern) + "}");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "") << pattern;
  EXPECT_TRUE(grammar.ok()) << pattern << ": " << grammar.status().message();
  return grammar.ok() ? *grammar : "";
}

bool lets_pass(const std::string& gbnf, const std::string& text) {
  const auto grammar = make_grammar(gbnf);
  EXPECT_TRUE(grammar.ok()) << grammar.status().message();
  return grammar.ok() && (*grammar)->accept(text).ok() && (*grammar)->may_end();
}

class Patterns : public ::testing::TestWithParam<const char*> {};

TEST_P(Patterns, AreThoseOfStdRegex) {
  const std::string pattern = GetParam();
  const std::string gbnf = grammar_of(pattern);
  const std::regex other(pattern);
  std::mt19937 random(7);
  const std::string letters = "ab1_- .\"\\\n\tz9Z(";
  std::uniform_int_distribution<size_t> length(0, 6), letter(0, letters.size() - 1);
  int n_found = 0;
  for (int i = 0; i < 300; ++i) {
    std::string text;
    for (size_t k = length(random); k > 0; --k)
      text += letters[i % 2 == 0 ? letter(random) % 5 : letter(random)];
    const bool found = std::regex_search(text, other);
    n_found += found ? 1 : 0;
    EXPECT_EQ(lets_pass(gbnf, json_string(text)), found) << pattern << " in " << json_string(text);
  }
  EXPECT_GT(n_found, 0) << pattern;
}

INSTANTIATE_TEST_SUITE_P(All, Patterns,
                         ::testing::Values("^a+b?$", "a", "^a", "b$", "^\\d{1,3}$", "\\d\\d", "^\\w+$",
                                           "^\\W*$", "^\\S+\\s?\\S*$", "^[^a]*$", "^[a-z0-9_-]*$",
                                           "^(a|b1|_)*$", "^a|b$", "^(a|b)$|1", "^.*$", "^.{2,}$",
                                           "^(?:a|(?:b|1)+)*$", "^a*?b+?$", "\"", "^[\"\\\\]*$", "^\\\\",
                                           "^[\\s\\S]{3}$", "^\\.?[-.]?$", "^\\x61\\u0062?$", "^[\\w.]+ ?$",
                                           "^(^a$|^b)", "^$", "^a?$", "\\(", "^[^\\d\\s]*$", "^a{2}$",
                                           "(^a|b$)", "^(|a)b*$", "1{0,2}$"));

TEST(Pattern, OfUnicode) {
  const std::string gbnf = grammar_of("^[\xC3\xA4-\xC3\xBC]{1,2}\xE2\x82\xAC?[^\xE4\xB8\xAD]$");
  EXPECT_TRUE(lets_pass(gbnf, "\"\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80\""));
  EXPECT_FALSE(lets_pass(gbnf, "\"\xC3\xA4\xE2\x82\xAC\xE4\xB8\xAD\""));
  EXPECT_TRUE(lets_pass(grammar_of("^\\u{1F600}\\uD83D\\uDE00$"), "\"\xF0\x9F\x98\x80\xF0\x9F\x98\x80\""));
  EXPECT_TRUE(lets_pass(grammar_of("^\\s$"), "\"\xE3\x80\x80\""));
  EXPECT_TRUE(lets_pass(grammar_of("^\\x01\\x1f$"), "\"\\u0001\\u001f\""));
}

TEST(Pattern, StaysReadable) {
  EXPECT_EQ(*plain_pattern("^[A-Z][a-z]+ ab$"), "^[A-Z][a-z]+ ab$");
  EXPECT_EQ(*plain_pattern("^\\d{4}:\\d{2}$"), "^[0-9]{4}:[0-9]{2}$");
}

// docs/server_api.md: "A pattern is followed as ECMAScript has it"
TEST(Pattern, WhatIsNotFollowedIsRefusedByName) {
  for (const auto& [pattern, part] : {std::pair("^(?=a)b$", "look ahead or behind"),
                                      {"(?<!a)b", "look ahead or behind"},
                                      {"^(?i)a$", "flags"},
                                      {"(a)\\1", "back reference"},
                                      {"(?<x>a)\\k<x>", "back reference"},
                                      {"\\bword\\b", "\\b"},
                                      {"^\\p{L}+$", "\\p class"},
                                      {"a^b", "^ or $ within"},
                                      {"(^a|b)c", "^ or $ within"},
                                      {"^(a$)*", "^ or $ within"}}) {
    const auto plain = plain_pattern(pattern);
    ASSERT_FALSE(plain.ok()) << pattern;
    EXPECT_EQ(plain.status().code(), StatusCode::invalid_argument);
    EXPECT_THAT(plain.status().message(), HasSubstr(part)) << pattern;
    EXPECT_THAT(plain.status().message(), HasSubstr("does not follow")) << pattern;
  }
  for (const char* pattern :
       {"(",  ")",   "a)",  "[a",    "*",           "^*$",  "a**", "a{5,2}", "a{-5}", "[z-a]", "[\\d-z]",
        "\\", "\\q", "a|+", "\\u12", "\\u{110000}", "(?<x", "[]",  "\\x4",   "$*",    "\xFF",  "\xED\xA0"}) {
    const auto plain = plain_pattern(pattern);
    EXPECT_FALSE(plain.ok()) << pattern;
  }
}

TEST(Pattern, SizesAreBounded) {
  EXPECT_THAT(plain_pattern(std::string(20'000, 'a')).status().message(), HasSubstr("longer than"));
  EXPECT_THAT(plain_pattern(std::string(100, '(') + "a" + std::string(100, ')')).status().message(),
              HasSubstr("nested deeper"));
  std::string classes;
  for (int i = 0; i < 4000; ++i) classes += "\\S";
  EXPECT_THAT(plain_pattern(classes).status().message(), HasSubstr("too long"));
  EXPECT_FALSE(plain_pattern("a{100001}").ok());
  EXPECT_FALSE(plain_pattern("a{99999999999999999999}").ok());
}

}  // namespace
}  // namespace narrows
