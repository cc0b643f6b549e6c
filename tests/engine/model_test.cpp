#include <gtest/gtest.h>

#include "support/session.h"
#include "support/smollm2.h"
namespace narrows::testing {
namespace {
TEST(SmolLM2, AnswersAQuestionOnALongText) {
  const auto model = smollm2();
  ASSERT_NE(model, nullptr);
  const std::vector<ChatMessage> chat = {{"user", gpl3() + "\n\nIn one sentence: what is this document?"}};
  const auto prompt = model->tokenizer().apply_chat_template(chat, true);
  ASSERT_TRUE(prompt.ok());
  const auto tokens = model->tokenizer().encode(*prompt, true, true);
  ASSERT_TRUE(tokens.ok());
  std::printf("%zu tokens\n", tokens->size());
  std::vector<std::unique_ptr<Session>> sessions;
  std::vector<Session*> pointers;
  for (const char* p : {"f16", "sals-25", "kivi-4", "kivi-2", "sals-12.5"}) {
    sessions.push_back(make_session(model, {.kv = p, .n_threads = 0}));
    pointers.push_back(sessions.back().get());
  }
  ASSERT_OK(Session::prefill_together(pointers, *tokens));
  for (Session* s : pointers) {
    std::vector<Token> out;
    for (int i = 0; i < 60; ++i) {
      const auto t = static_cast<Token>(argmax(s->logits()));
      if (model->tokenizer().is_end(t)) break;
      out.push_back(t);
      ASSERT_OK(s->decode(t));
    }
    std::printf("%s: %s\n", s->profile().name.c_str(), model->tokenizer().decode(out).c_str());
  }
}
}  // namespace
}  // namespace narrows::testing
