// One tokenizer shared by threads, while others load files that fail: each thread must get its own reason.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "narrows/text.h"
#include "temp_dir.h"
#include "text/tiny_vocabulary.h"

namespace narrows {
namespace {

TEST(TokenizerConcurrent, SharedUseAndFailingLoads) {
  const testing::TempDir dir;
  testing::TinyVocabulary vocabulary;
  vocabulary.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}";
  ASSERT_TRUE(vocabulary.write(dir.path("good.gguf")));
  testing::TinyVocabulary unknown;
  unknown.tokenizer = "abacus";
  ASSERT_TRUE(unknown.write(dir.path("unknown.gguf")));
  dir.file("text.gguf", "no model");

  const auto shared = Tokenizer::load(dir.path("good.gguf"));
  ASSERT_TRUE(shared.ok()) << shared.status().message();
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const ChatMessage message = {"user", "he said " + std::to_string(i)};
      for (int round = 0; round < 300; ++round) {
        const auto text = (*shared)->apply_chat_template(std::span(&message, 1), true);
        if (!text.ok() || text->text != message.content) ++wrong;
        const auto tokens = (*shared)->encode(message.content, true, true);
        if (!tokens.ok() || (*shared)->decode(*tokens) != message.content) ++wrong;
        const bool odd = i % 2 == 1;
        const auto failed = Tokenizer::load(dir.path(odd ? "unknown.gguf" : "text.gguf"));
        if (failed.ok() || failed.status().message().find(odd ? "abacus" : "magic") == std::string::npos)
          ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace narrows
