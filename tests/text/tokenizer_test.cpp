// Tokenizer without a model: files that are wrong, the ChatML fallback, templates that do not parse or
// refuse.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "narrows/text.h"
#include "temp_dir.h"
#include "text/llama_log.h"
#include "text/tiny_vocabulary.h"

namespace narrows {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using testing::TempDir;
using testing::TinyVocabulary;

Result<std::unique_ptr<Tokenizer>> load(const TempDir& dir, const TinyVocabulary& vocabulary) {
  EXPECT_TRUE(vocabulary.write(dir.path("v.gguf")));
  return Tokenizer::load(dir.path("v.gguf"));
}

const ChatMessage kQuestion = {"user", "hi"};

TEST(Tokenizer, ReadsAByteLevelVocabulary) {
  const TempDir dir;
  const auto tokenizer = load(dir, {});
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  const Tokenizer& t = **tokenizer;
  EXPECT_EQ(t.n_vocab(), 258);
  EXPECT_EQ(*t.encode("hehx", false, false), (std::vector<Token>{257, 'h', 'x'}));
  std::string all_ascii;
  for (char c = 0; c < 127; ++c) all_ascii += c;
  EXPECT_EQ(t.decode(*t.encode(all_ascii, false, false)), all_ascii);  // NUL and all control characters
  EXPECT_TRUE(t.is_end(256));
  EXPECT_FALSE(t.is_end('h'));
}

TEST(Tokenizer, IdsOutsideTheVocabularyAreNothing) {
  const TempDir dir;
  const auto tokenizer = load(dir, {});
  ASSERT_TRUE(tokenizer.ok());
  for (const Token token : {-1, 258, 1 << 30, -(1 << 30)}) {
    EXPECT_EQ((*tokenizer)->piece(token, true), "");
    EXPECT_FALSE((*tokenizer)->is_end(token));
  }
}

TEST(Tokenizer, RefusesFilesThatAreNoModels) {
  const TempDir dir;
  const auto refusal = [&](const std::string& path) {
    const auto tokenizer = Tokenizer::load(path);
    EXPECT_EQ(tokenizer.status().code(), StatusCode::invalid_file) << path;
    EXPECT_EQ(tokenizer.status().message().find('\n'), std::string::npos);
    return tokenizer.status().message();
  };
  EXPECT_THAT(refusal(dir.path("none.gguf")), HasSubstr("no such file"));
  EXPECT_THAT(refusal(dir.path("")), HasSubstr("folder"));
  refusal(dir.file("empty.gguf", ""));
  EXPECT_THAT(refusal(dir.file("text.gguf", "this is not a model file, but a text")), HasSubstr("magic"));
  refusal(dir.file("cut.gguf", std::string("GGUF\x03\0\0\0", 8)));
}

TEST(Tokenizer, RefusesVocabulariesThatAreWrong) {
  const TempDir dir;
  TinyVocabulary none;
  none.tokenizer = "none";
  EXPECT_THAT(load(dir, none).status().message(), HasSubstr("none"));
  TinyVocabulary no_tokens;
  no_tokens.no_tokens = true;
  EXPECT_THAT(load(dir, no_tokens).status().message(), HasSubstr("cannot find tokenizer vocab"));
  TinyVocabulary unknown;
  unknown.tokenizer = "abacus";
  EXPECT_THAT(load(dir, unknown).status().message(), HasSubstr("abacus"));
}

TEST(Tokenizer, AssertionsOfLibllamaAreErrors) {
  // Without LlamaAbortGuard both end the process.
  const TempDir dir;
  TinyVocabulary twice;
  twice.word_twice = true;
  const auto refused = load(dir, twice);
  EXPECT_EQ(refused.status().code(), StatusCode::invalid_file);
  EXPECT_THAT(refused.status().message(), HasSubstr("GGML_ASSERT"));
  EXPECT_THAT(refused.status().message(), Not(HasSubstr("/src/")));  // the build folder is nobody's business

  TinyVocabulary no_bos;
  no_bos.wants_unknown_bos = true;
  const auto tokenizer = load(dir, no_bos);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_TRUE((*tokenizer)->encode("!", false, false).ok());
  const auto tokens = (*tokenizer)->encode("!", true, false);
  EXPECT_EQ(tokens.status().code(), StatusCode::invalid_file);
  EXPECT_THAT(tokens.status().message(), HasSubstr("BOS"));
}

TEST(Tokenizer, NothingOfLibllamaReachesTheTerminal) {
  const TempDir dir;
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  (void)Tokenizer::load(dir.file("text.gguf", "no model"));
  TinyVocabulary broken;
  broken.chat_template = "{% for %}";
  const auto tokenizer = load(dir, broken);
  EXPECT_EQ(::testing::internal::GetCapturedStdout(), "");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

TEST(Tokenizer, InvalidUtf8IsNamedByItsOffset) {
  const TempDir dir;
  const auto tokenizer = load(dir, {});
  ASSERT_TRUE(tokenizer.ok());
  const auto tokens = (*tokenizer)->encode("abc\xFF", false, false);
  EXPECT_EQ(tokens.status().code(), StatusCode::invalid_argument);
  EXPECT_THAT(tokens.status().message(), HasSubstr("byte 3"));
}

TEST(ChatTemplate, FallsBackToChatMl) {
  const TempDir dir;
  const auto tokenizer = load(dir, {});
  ASSERT_TRUE(tokenizer.ok());
  EXPECT_FALSE((*tokenizer)->has_chat_template());
  const ChatMessage messages[] = {{"system", "s"}, kQuestion};
  EXPECT_EQ((*tokenizer)->apply_chat_template(messages, true)->text,
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ((*tokenizer)->apply_chat_template(std::span(&kQuestion, 1), false)->text,
            "<|im_start|>user\nhi<|im_end|>\n");
}

TEST(ChatTemplate, OfTheFileIsUsed) {
  const TempDir dir;
  TinyVocabulary vocabulary;
  vocabulary.chat_template =
      "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
      "{% if add_generation_prompt %}[assistant]{% endif %}";
  const auto tokenizer = load(dir, vocabulary);
  ASSERT_TRUE(tokenizer.ok());
  EXPECT_TRUE((*tokenizer)->has_chat_template());
  EXPECT_EQ((*tokenizer)->apply_chat_template(std::span(&kQuestion, 1), true)->text,
            "[user] hi\n[assistant]");
  EXPECT_EQ((*tokenizer)->apply_chat_template(std::span(&kQuestion, 1), false)->text, "[user] hi\n");
}

TEST(ChatTemplate, OptionsGiveAnotherAndItsArguments) {
  const TempDir dir;
  TinyVocabulary vocabulary;
  vocabulary.chat_template = "{% if enable_thinking %}think {% endif %}{{ depth }}{{ messages[0].content }}";
  ASSERT_TRUE(vocabulary.write(dir.path("v.gguf")));
  const auto rendered = [&](const ChatTemplateOptions& options) {
    auto tokenizer = Tokenizer::load(dir.path("v.gguf"), options);
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
    return (*tokenizer)->apply_chat_template(std::span(&kQuestion, 1), true)->text;
  };
  EXPECT_EQ(rendered({}), "think hi");
  EXPECT_EQ(rendered({"", {{"enable_thinking", "false"}, {"depth", "3"}}}), "3hi");
  EXPECT_EQ(rendered({"{{ messages[0].role }}{{ depth }}", {{"depth", "\"deep\""}}}), "userdeep");
  EXPECT_EQ(rendered({"chatml", {}}), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
  // In a file without one too.
  vocabulary.chat_template.clear();
  ASSERT_TRUE(vocabulary.write(dir.path("v.gguf")));
  EXPECT_EQ(rendered({"<{{ messages[0].content }}>", {}}), "<hi>");
  for (const auto& [options, word] :
       {std::pair(ChatTemplateOptions{"{% if %}", {}}, "cannot be read"),
        std::pair(ChatTemplateOptions{"", {{"enable_thinking", "\"no\""}}}, "true or false")}) {
    const auto refused = Tokenizer::load(dir.path("v.gguf"), options);
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.status().code(), StatusCode::invalid_argument);
    EXPECT_THAT(refused.status().message(), HasSubstr(word));
  }
}

TEST(ChatTemplate, BrokenOneSpoilsChatOnly) {
  const TempDir dir;
  TinyVocabulary vocabulary;
  vocabulary.chat_template = "{% for m in %}{{ m.content";
  const auto tokenizer = load(dir, vocabulary);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_TRUE((*tokenizer)->encode("raw text", false, false).ok());
  const auto text = (*tokenizer)->apply_chat_template(std::span(&kQuestion, 1), true);
  EXPECT_EQ(text.status().code(), StatusCode::unsupported);
  EXPECT_EQ(text.status().message().find('\n'), std::string::npos);
}

TEST(ChatTemplate, JumpOutsideOfALoopIsAnError) {
  // llama.cpp carries `break` by an exception: nothing inside catches this one.
  const TempDir dir;
  TinyVocabulary vocabulary;
  vocabulary.chat_template = "{{ messages[0].content }}{% break %}";
  const auto tokenizer = load(dir, vocabulary);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_FALSE((*tokenizer)->apply_chat_template(std::span(&kQuestion, 1), true).ok());
}

TEST(ChatTemplate, MayRefuseTheMessages) {
  const TempDir dir;
  TinyVocabulary vocabulary;
  vocabulary.chat_template =
      "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
      "{{ m.content }}{% endfor %}";
  const auto tokenizer = load(dir, vocabulary);
  ASSERT_TRUE(tokenizer.ok());
  const ChatMessage tool = {"tool", "x"};
  const auto text = (*tokenizer)->apply_chat_template(std::span(&tool, 1), true);
  EXPECT_EQ(text.status().code(), StatusCode::invalid_argument);
  EXPECT_THAT(text.status().message(), HasSubstr("no tools here"));
  EXPECT_EQ(text.status().message().find('\n'), std::string::npos);
  EXPECT_TRUE((*tokenizer)->apply_chat_template(std::span(&kQuestion, 1), true).ok());
}

}  // namespace
}  // namespace narrows
