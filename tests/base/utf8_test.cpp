// UTF-8: the borders of every range in Unicode's table, against a second, arithmetic decoder.
#include "base/utf8.h"

#include <gtest/gtest.h>

#include <string>

namespace narrows {
namespace {

using namespace std::string_literals;
constexpr size_t kNone = std::string_view::npos;

/// Encodes without any check: also surrogates and numbers beyond U+10FFFF.
std::string encode(uint32_t c) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | ((c >> shift) & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | (c >> 6)), tail(0)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | (c >> 12)), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | (c >> 18)), tail(12), tail(6), tail(0)};
}

TEST(Utf8, EveryCodePointIsJudgedByArithmetic) {
  // Guards the ranges of the second byte: all code points, among them all surrogates, and some beyond the
  // last.
  for (uint32_t c = 0; c < 0x1FFFFF; ++c) {
    const bool valid = c < 0xD800 || (c > 0xDFFF && c <= 0x10FFFF);
    ASSERT_EQ(find_invalid_utf8(encode(c)), valid ? kNone : 0U) << std::hex << c;
  }
}

TEST(Utf8, OverlongFormsAreInvalid) {
  for (const std::string& bytes :
       {"\xC0\x80"s, "\xC1\xBF"s, "\xE0\x80\x80"s, "\xE0\x9F\xBF"s, "\xF0\x80\x80\x80"s, "\xF0\x8F\xBF\xBF"s,
        "\xF8\x88\x80\x80\x80"s, "\xFF"s, "\xFE"s, "\x80"s, "\xBF"s}) {
    EXPECT_EQ(find_invalid_utf8(bytes), 0U);
  }
}

TEST(Utf8, OffsetIsThatOfTheSequence) {
  // The eight-byte steps over ASCII must not skip or shift anything: an error at every position.
  for (size_t at = 0; at < 40; ++at) {
    std::string text(40, 'a');
    text[at] = '\xFF';
    EXPECT_EQ(find_invalid_utf8(text), at);
  }
  EXPECT_EQ(find_invalid_utf8("ab\xE2\x82"), 2U);  // cut off
  EXPECT_EQ(find_invalid_utf8("\xE2\x82\xAC\xE2\x28\xA1"), 3U);
  EXPECT_EQ(find_invalid_utf8(""), kNone);
  EXPECT_EQ(find_invalid_utf8("a\0b"s), kNone);  // NUL is a character
}

TEST(Utf8, InvalidPartIsTheLongestThatCouldHaveBegunASequence) {
  const Utf8Sequence three_of_four = first_utf8_sequence(
      "\xF0\x9F\x98"
      "a");
  EXPECT_EQ(three_of_four.kind, Utf8Kind::invalid);
  EXPECT_EQ(three_of_four.length, 3U);
  const Utf8Sequence surrogate = first_utf8_sequence("\xED\xA0\x80");
  EXPECT_EQ(surrogate.kind, Utf8Kind::invalid);
  EXPECT_EQ(surrogate.length, 1U);
  const Utf8Sequence begun = first_utf8_sequence("\xF0\x9F\x98");
  EXPECT_EQ(begun.kind, Utf8Kind::incomplete);
  EXPECT_EQ(begun.length, 3U);
  // Not incomplete: no fourth byte can make F4 90 .. a character.
  EXPECT_EQ(first_utf8_sequence("\xF4\x90").kind, Utf8Kind::invalid);
}

TEST(Utf8, QuoteIsOneHarmlessLine) {
  EXPECT_EQ(quote("a b"), "'a b'");
  EXPECT_EQ(quote("a\nb\x1b[2J\x7f"), "'a\\x0ab\\x1b[2J\\x7f'");  // no line breaks, no terminal commands
  EXPECT_EQ(quote("\xC2\x9B"
                  "2J"),
            "'\\xc2\\x9b2J'");  // the 8-bit form of the same command
  EXPECT_EQ(quote("\xC3\xA4\xFF"), "'\xC3\xA4\\xff'");
  EXPECT_EQ(quote("caf\xC3\xA9", 4), "'caf...'");  // never cut through a character
  EXPECT_EQ(find_invalid_utf8(quote(std::string(300, '\xE2'))), kNone);
}

}  // namespace
}  // namespace narrows
