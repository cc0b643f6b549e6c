// Layers that see a window, in whole sessions: texts many times as long, against libllama; going back,
// sharing and saving, to the last bit; memory.
#include <gtest/gtest.h>

#include "engine/session_impl.h"
#include "narrows/session_file.h"
#include "support/llama_reference.h"
#include "support/sanitized.h"
#include "support/session.h"
#include "temp_dir.h"

namespace narrows::testing {
namespace {

const LoadedTiny& tiny() {
  static const LoadedTiny loaded([] {
    TinyModel m;
    m.architecture = "gemma3";
    m.head_dim = 32;
    m.n_layer = 5;
    m.n_ctx = 8192;
    m.window = 40;  // layers 0, 1, 3 and 4
    m.window_period = 3;
    m.freq_base = 1e6;
    return m;
  }());
  return loaded;
}

std::unique_ptr<Session> session_of(const std::string& profile, bool segments = false) {
  return make_session(tiny().model, {.kv = profile, .segments = segments});
}

TEST(Window, TextsManyTimesAsLongAreLibllamas) {
  const std::vector<Token> tokens = random_tokens(1800);
  const LogitRows exact = llama_logits(tiny().path, tokens, LlamaWay::exact);
  const LogitRows rounded = llama_logits(tiny().path, tokens, LlamaWay::f16_flash);
  double deviation = 0;
  for (const int64_t i : {500, 1000, 1500}) deviation += standard_deviation(exact.row(i)) / 3;
  auto session = session_of("f16");
  ASSERT_OK(session->prefill(std::span(tokens).first(1500)));
  // As in parity_test.cpp: ggml's angles are float32 products, its gelu is a table of halves.
  const double tolerance = (std::ldexp(1.0, -24) * 1516 * 4 + std::ldexp(1.0, -9)) * deviation;
  EXPECT_LT(max_difference(exact.row(1499), session->logits()), tolerance);
  double ours = 0, libllamas = 0;
  for (int64_t i = 1500; i < 1800; ++i) {
    ASSERT_OK(session->decode(tokens[static_cast<size_t>(i)]));
    ours += kl_divergence(exact.row(i), session->logits()) / 300;
    libllamas += kl_divergence(exact.row(i), rounded.row(i)) / 300;
  }
  EXPECT_LT(ours, 2 * libllamas);
  // A second prompt attends to what the cache holds, and steps come before and after.
  auto pieces = session_of("f16");
  ASSERT_OK(pieces->prefill(std::span(tokens).first(700)));
  for (int64_t i = 700; i < 740; ++i) ASSERT_OK(pieces->decode(tokens[static_cast<size_t>(i)]));
  ASSERT_OK(pieces->prefill(std::span(tokens).subspan(740, 760)));
  EXPECT_LT(kl_divergence(exact.row(1499), pieces->logits()), 20 * libllamas);
}

// Tokens before the window reach the layers that see all, and no others.
TEST(Window, HidesNothingFromTheOtherLayers) {
  std::vector<Token> tokens = random_tokens(900), other = tokens;
  for (size_t i = 0; i < 50; ++i) other[i] = (other[i] + 1) % 256;
  auto a = session_of("f16"), b = session_of("f16");
  ASSERT_OK(a->prefill(tokens));
  ASSERT_OK(b->prefill(other));
  EXPECT_GT(max_difference(a->logits(), b->logits()), 1e-3);
}

TEST(Window, MemoryIsThatOfTheLayersWithoutOne) {
  for (const char* const profile : {"f16", "klt", "kivi-4"}) {
    if (kSanitized && std::string(profile) != "klt") continue;
    auto session = session_of(profile);
    ASSERT_OK(session->prefill(random_tokens(2000)));
    const KvCache& cache = *Access::impl(*session).cache;
    const int64_t window = cache.layer(0).bytes().total();
    EXPECT_EQ(cache.layer(4).bytes().total(), window);
    EXPECT_LT(window, cache.layer(2).shape().width() * 4 * 768);
    const int64_t estimate = cache_bytes_estimate(*tiny().model, kv(profile), 2000);
    EXPECT_LE(session->cache_stats().bytes, estimate) << profile;
    EXPECT_GT(session->cache_stats().bytes, estimate / 2) << profile;
    decode_all(*session, random_tokens(1500, 3));
    EXPECT_LE(cache.layer(0).bytes().total(), window + cache.layer(0).shape().width() * 4 * 128) << profile;
  }
}

class WindowPrefix : public ::testing::TestWithParam<std::string> {};

std::vector<std::vector<float>> read_on(Session& session, std::span<const Token> rest) {
  EXPECT_TRUE(session.prefill(rest).ok());
  std::vector<std::vector<float>> rows{copy(session.logits())};
  for (auto& row : decode_all(session, random_tokens(12, 77))) rows.push_back(std::move(row));
  return rows;
}

// The next question about a text, the same text with another one, and a chat that goes on.
TEST_P(WindowPrefix, AnotherPromptGoesOnFromTheEndOfASegment) {
  for (const int64_t common : {700, 2700, 4700}) {
    std::vector<Token> first = random_tokens(common, 5), second = first;
    for (const Token t : random_tokens(400, 101)) first.push_back(t);
    for (const Token t : random_tokens(300, 102)) second.push_back(t);
    auto fresh = session_of(GetParam(), true);
    const auto want = read_on(*fresh, second);

    auto session = session_of(GetParam(), true);
    read_on(*session, first);
    // Answers let go of what the window leaves behind; marks stay.
    decode_all(*session, random_tokens(700, 9));
    const int64_t n = session->kept_prefix(common);
    auto other = session_of(GetParam(), true);
    if (n > 0) {
      ASSERT_OK(other->share_prefix(*session, n));
      EXPECT_EQ(max_difference(want, read_on(*other, std::span(second).subspan(static_cast<size_t>(n)))), 0)
          << common << ", shared at " << n;
      session->keep_prefix(n);
    } else {
      session->reset();
    }
    EXPECT_EQ(max_difference(want, read_on(*session, std::span(second).subspan(static_cast<size_t>(n)))), 0)
        << common << ", kept " << n;
  }
}

TEST_P(WindowPrefix, AChatGoesOnWhereItsPromptEnded) {
  const std::vector<Token> first = random_tokens(2600, 5);
  auto session = session_of(GetParam(), true);
  read_on(*session, first);
  decode_all(*session, random_tokens(900, 9));
  EXPECT_EQ(session->kept_prefix(session->n_past()), Session::segment_end(session->profile(), 2600));
}

TEST_P(WindowPrefix, ASavedSessionGoesOn) {
  const TempDir dir;
  auto session = session_of(GetParam(), true);
  const std::vector<Token> text = random_tokens(2000, 5);
  ASSERT_OK(session->prefill(text));
  ASSERT_OK(save_session(*session, text, dir.path("s")));
  auto loaded = load_session(tiny().model, Access::impl(*session).options, dir.path("s"));
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->session->kept_prefix(2000), session->kept_prefix(2000));
  const std::vector<Token> next = random_tokens(800, 6);
  EXPECT_EQ(max_difference(decode_all(*session, next), decode_all(*loaded->session, next)), 0);
}

// A prompt that is given up half way leaves what was there before.
TEST_P(WindowPrefix, AStoppedPromptLeavesWhatWasThere) {
  std::vector<Token> text = random_tokens(9 * 512, 5);
  auto session = session_of(GetParam(), true);
  ASSERT_OK(session->prefill(std::span(text).first(1500)));
  const int64_t before = session->kept_prefix(1500);
  ASSERT_GT(before, 1000);
  session->keep_prefix(before);
  ASSERT_OK(session->begin_prefill(std::span(text).subspan(static_cast<size_t>(before))));
  for (int i = 0; i < 20; ++i) ASSERT_OK(session->prefill_step());
  EXPECT_EQ(session->go_back(before), before);
  auto fresh = session_of(GetParam(), true);
  const auto want = read_on(*fresh, std::span(text).first(2000));
  EXPECT_EQ(max_difference(
                want, read_on(*session, std::span(text).first(2000).subspan(static_cast<size_t>(before)))),
            0);
}

INSTANTIATE_TEST_SUITE_P(Profiles, WindowPrefix, ::testing::Values("f16", "klt"));

}  // namespace
}  // namespace narrows::testing
