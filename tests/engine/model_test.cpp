#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>

#include "narrows/session_file.h"
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
  const auto tokens = model->tokenizer().encode(*prompt);
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

std::unique_ptr<Session> in_segments(const std::shared_ptr<const Model>& model, const std::string& profile) {
  SessionOptions options;
  options.kv = kv(profile);
  options.segments = true;
  auto session = Session::create(model, options);
  EXPECT_TRUE(session.ok()) << session.status().message();
  return std::move(*session);
}

// On real weights and with the products that a real prompt takes; the tiny models have neither.
TEST(SmolLM2, APrefixIsReusedToTheLastBit) {
  const auto model = smollm2();
  const auto first = gpl3_tokens(*model, 3000);
  std::vector<Token> second(first.begin(), first.begin() + 2700);
  const auto other = random_tokens(260);
  second.insert(second.end(), other.begin(), other.end());
  for (const char* profile : {"klt", "f16", "kivi-4"}) {
    auto fresh = in_segments(model, profile), used = in_segments(model, profile);
    ASSERT_OK(fresh->prefill(second));
    ASSERT_OK(used->prefill(first));
    decode_all(*used, random_tokens(20));
    const int64_t n = used->kept_prefix(2700);
    EXPECT_GT(n, 2700 - 256 - 1);
    used->keep_prefix(n);
    ASSERT_OK(used->prefill(std::span(second).subspan(static_cast<size_t>(n))));
    EXPECT_EQ(max_difference(fresh->logits(), used->logits()), 0) << profile;
    EXPECT_EQ(greedy(*fresh, 12), greedy(*used, 12)) << profile;
  }
}

// Measured: .02 with klt either way (docs/experiments.md).
TEST(SmolLM2, SegmentsCostLittle) {
  const auto model = smollm2();
  const auto tokens = gpl3_tokens(*model, 3000);
  const auto prompt = std::span(tokens).first(2960);
  auto exact = make_session(model, {.kv = "f16", .n_threads = 0});
  ASSERT_OK(exact->prefill(prompt));
  for (const auto& [profile, most] : {std::pair("f16", 0.02), std::pair("klt", 0.06)}) {
    auto session = in_segments(model, profile);
    ASSERT_OK(session->prefill(prompt));
    double kl = kl_divergence(exact->logits(), session->logits());
    auto again = make_session(model, {.kv = "f16", .n_threads = 0});
    ASSERT_OK(again->prefill(prompt));
    for (size_t i = prompt.size(); i < tokens.size(); ++i) {
      ASSERT_OK(session->decode(tokens[i]));
      ASSERT_OK(again->decode(tokens[i]));
      kl += kl_divergence(again->logits(), session->logits());
    }
    kl /= static_cast<double>(tokens.size() - prompt.size() + 1);
    std::printf("%s: KL %.4f\n", profile, kl);
    EXPECT_LT(kl, most) << profile;
  }
}

TEST(SmolLM2, ASessionOnDiskIsSmallAndSoonThere) {
  const auto model = smollm2();
  const auto tokens = gpl3_tokens(*model, 4000);
  const TempDir dir;
  auto session = make_session(model, {.kv = "klt", .n_threads = 0});
  const auto now = [] { return std::chrono::steady_clock::now(); };
  const auto begin = now();
  ASSERT_OK(session->prefill(tokens));
  const auto read = now();
  ASSERT_OK(save_session(*session, tokens, dir.path("s")));
  const auto saved = now();
  auto loaded = load_session(model, {}, dir.path("s"));
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  const auto restored = now();
  const auto bytes = static_cast<double>(std::filesystem::file_size(dir.path("s")));
  const auto ms = [](auto d) { return std::chrono::duration<double, std::milli>(d).count(); };
  std::printf("prefill %.0f ms, save %.0f, restore %.0f; %.1f MB, f16 %.1f\n", ms(read - begin),
              ms(saved - read), ms(restored - saved), bytes / 1e6,
              static_cast<double>(session->cache_stats().bytes_f16) / 1e6);
  EXPECT_LT(bytes * 3.5, static_cast<double>(session->cache_stats().bytes_f16));
  EXPECT_LT(ms(restored - saved) * 5, ms(read - begin));
  EXPECT_EQ(greedy(*session, 10), greedy(*loaded->session, 10));
}

}  // namespace
}  // namespace narrows::testing
