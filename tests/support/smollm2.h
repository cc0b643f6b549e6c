// The default model and a long text that every Debian ships, for tests with the label `model`.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "narrows/engine.h"

namespace narrows::testing {

inline const std::string& smollm2_path() {
  static const std::string path = NARROWS_MODELS_DIR "/SmolLM2-135M-Instruct.Q4_1.gguf";
  return path;
}

inline std::shared_ptr<const Model> smollm2(const LoadOptions& options = {}) {
  auto model = Model::load(smollm2_path(), options);
  EXPECT_TRUE(model.ok()) << model.status().message();
  return model.ok() ? *model : nullptr;
}

/// 35 kB, about 7,600 tokens.
inline std::string gpl3() {
  std::ifstream in("/usr/share/common-licenses/GPL-3", std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  EXPECT_GT(text.size(), 30000U) << "/usr/share/common-licenses/GPL-3 is not there";
  return text;
}

inline std::vector<Token> gpl3_tokens(const Model& model, size_t n) {
  auto tokens = model.tokenizer().encode(gpl3(), true, false);
  EXPECT_TRUE(tokens.ok());
  EXPECT_GT(tokens->size(), n);
  tokens->resize(n);
  return *tokens;
}

}  // namespace narrows::testing
