// Utf8Stream: the same text whatever the pieces, and never half a character.
#include <gtest/gtest.h>

#include <string>

#include "base/utf8.h"
#include "narrows/text.h"

namespace narrows {
namespace {

/// Feeds `bytes` in pieces of `size` and checks that every part that comes out is UTF-8.
std::string streamed(const std::string& bytes, size_t size) {
  Utf8Stream stream;
  std::string text;
  for (size_t at = 0; at < bytes.size(); at += size) {
    const std::string part = stream.push(std::string_view(bytes).substr(at, size));
    EXPECT_EQ(find_invalid_utf8(part), std::string::npos) << "piece size " << size << " at " << at;
    text += part;
  }
  const std::string rest = stream.flush();
  EXPECT_EQ(find_invalid_utf8(rest), std::string::npos);
  EXPECT_EQ(stream.flush(), "");
  return text + rest;
}

TEST(Utf8Stream, WholeTextPassesInAnyPieces) {
  const std::string text = "a\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80 z";
  for (size_t size = 1; size <= text.size(); ++size) EXPECT_EQ(streamed(text, size), text);
}

TEST(Utf8Stream, WaitsForTheRestOfACharacterOnly) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("ab\xE2\x82"), "ab");
  EXPECT_EQ(stream.push("\xAC"
                        "c"),
            "\xE2\x82\xAC"
            "c");
  EXPECT_EQ(stream.flush(), "");
}

TEST(Utf8Stream, WrongBytesBecomeOneReplacementAPart) {
  const std::string r(kReplacementCharacter);
  for (size_t size = 1; size <= 8; ++size) {
    EXPECT_EQ(streamed("a\xFF"
                       "b",
                       size),
              "a" + r + "b");
    EXPECT_EQ(streamed("\xE2\x82"
                       "b",
                       size),
              r + "b");                                    // begun, not finished
    EXPECT_EQ(streamed("\xE2\x82", size), r);              // cut off by the end
    EXPECT_EQ(streamed("\xED\xA0\x80", size), r + r + r);  // a surrogate: no byte of it can begin anything
    EXPECT_EQ(streamed("\xF0\x9F\xF0\x9F\x98\x80", size), r + "\xF0\x9F\x98\x80");
  }
}

}  // namespace
}  // namespace narrows
