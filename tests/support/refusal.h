// Checks on refusals: the code, one line, no full stop, and the words that say which file and which item.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "narrows/status.h"

namespace narrows::testing {

inline void expect_sentence(const Status& s) {
  EXPECT_FALSE(s.message().empty());
  for (const char c : s.message()) {
    EXPECT_GE(static_cast<unsigned char>(c), 0x20) << "a control character in: " << s.message();
  }
  if (!s.message().empty()) {
    EXPECT_NE(s.message().back(), '.') << s.message();
  }
}

inline void expect_refusal(const Status& s, StatusCode code, const std::vector<std::string>& words) {
  EXPECT_EQ(static_cast<int>(s.code()), static_cast<int>(code)) << s.message();
  if (s.ok()) return;
  expect_sentence(s);
  for (const std::string& word : words) {
    EXPECT_NE(s.message().find(word), std::string::npos) << "'" << word << "' is not in: " << s.message();
  }
}

template <class T>
Status status_of(const Result<T>& r) {
  return r.ok() ? Status() : r.status();
}

}  // namespace narrows::testing
