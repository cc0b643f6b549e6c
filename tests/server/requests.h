// Bodies for tests of what requests mean.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "server/dialect.h"
#include "server/request.h"

namespace narrows::server {

inline RequestDefaults test_defaults() {
  RequestDefaults d;
  d.n_vocab = 1000;
  d.n_ctx = 4096;
  return d;
}

/// A chat with these fields behind its messages.
inline std::string chat_with(const std::string& fields) {
  return R"({"messages":[{"role":"user","content":"hi"}])" + (fields.empty() ? "" : "," + fields) + "}";
}

inline GenerationRequest taken(const Dialect& dialect, const std::string& body) {
  ApiError error;
  const auto r = dialect.parse(body, test_defaults(), error);
  EXPECT_TRUE(r.has_value()) << error.message << " of " << body;
  return r.value_or(GenerationRequest());
}

/// The sentence that refuses it; "": it was taken.
inline std::string refusal(const Dialect& dialect, const std::string& body, std::string* param = nullptr) {
  ApiError error;
  if (dialect.parse(body, test_defaults(), error)) return {};
  EXPECT_EQ(error.http_code, 400) << body;
  if (param != nullptr) *param = error.param;
  return error.message;
}

}  // namespace narrows::server
