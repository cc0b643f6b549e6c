// Models of experts in whole sessions: prompts longer than a chunk against libllama, by every way of
// multiplying; caches that compress; batches, prefixes and saved sessions to the last bit.
#include <gtest/gtest.h>

#include "engine/session_impl.h"
#include "exec/cpu/loaded_layer.h"
#include "narrows/session_file.h"
#include "support/llama_reference.h"
#include "support/session.h"
#include "temp_dir.h"

namespace narrows::testing {
namespace {

constexpr int64_t kPrompt = 1300;
constexpr int64_t kTokens = 1400;

TinyModel experts(ggml_type type = GGML_TYPE_F32) {
  TinyModel m;
  m.architecture = "qwen3moe";
  m.n_layer = 3;
  m.n_ctx = 8192;
  m.head_dim = 32;
  m.n_ff = 64;
  m.n_expert = 12;
  m.n_used = 3;
  m.freq_base = 1e6;
  m.type = type;
  return m;
}

const LoadedTiny& tiny() {
  static const LoadedTiny loaded(experts());
  return loaded;
}

struct Reference {
  std::vector<Token> tokens = random_tokens(kTokens);
  LogitRows exact = llama_logits(tiny().path, tokens, LlamaWay::exact);
  double rounded_kl = 0;  ///< what libllama's own f16 cache costs in the steps

  Reference() {
    const LogitRows rounded = llama_logits(tiny().path, tokens, LlamaWay::f16_flash);
    for (int64_t i = kPrompt; i < kTokens; ++i)
      rounded_kl += kl_divergence(exact.row(i), rounded.row(i)) / (kTokens - kPrompt);
  }
  std::span<const Token> prompt() const { return std::span(tokens).first(kPrompt); }
  std::span<const Token> rest() const { return std::span(tokens).subspan(kPrompt); }
};

const Reference& reference() {
  static const Reference made;
  return made;
}

/// Mean divergence of the prompt's last row and of the steps after it.
std::pair<double, double> divergence(const SessionSetup& setup) {
  const Reference& r = reference();
  auto session = make_session(tiny().model, setup);
  EXPECT_TRUE(session->prefill(r.prompt()).ok());
  const double prompt = kl_divergence(r.exact.row(kPrompt - 1), session->logits());
  const auto rows = decode_all(*session, r.rest());
  double steps = 0;
  for (size_t i = 0; i < rows.size(); ++i)
    steps += kl_divergence(r.exact.row(kPrompt + static_cast<int64_t>(i)), rows[i]) /
             static_cast<double>(rows.size());
  return {prompt, steps};
}

TEST(Experts, PromptsAndStepsAreLibllamas) {
  const auto [prompt, steps] = divergence({.kv = "f16", .n_threads = 2});
  EXPECT_LT(prompt, 1e-9);
  EXPECT_LT(steps, 2 * reference().rounded_kl);
  EXPECT_LT(steps, 1e-5);
}

// Loaded layers round to bfloat16; experts are not among what is loaded.
TEST(Experts, OtherPrecisionsOfAPromptAreNear) {
  const auto floats = divergence({.prompt = {PrefillProducts::bf16, PrefillAttention::f32}});
  EXPECT_LT(floats.first, 1e-6);  // float32 weights stay as they are
  const auto automatic = divergence({.n_threads = 2, .prompt = {}});
  EXPECT_LT(automatic.first, 1e-3);
  EXPECT_LT(automatic.second, 1e-3);
}

TEST(Experts, QuantisedPromptsAreNearToTheirSteps) {
  for (const ggml_type type : {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
    const LoadedTiny loaded(experts(type));
    const std::vector<Token> tokens = random_tokens(300);
    std::vector<std::vector<float>> last;
    for (const PrefillProducts how : {PrefillProducts::int8, PrefillProducts::bf16}) {
      auto session = make_session(loaded.model, {.n_threads = 2, .prompt = {how, PrefillAttention::f32}});
      ASSERT_OK(session->prefill(tokens));
      last.push_back(copy(session->logits()));
    }
    EXPECT_LT(kl_divergence(last[0], last[1]), 0.02) << ggml_type_name(type);
  }
}

TEST(Experts, CachesThatCompressCostSomeTimesWhatTheyCostADenseModel) {
  EXPECT_LT(divergence({.kv = "klt", .n_threads = 2}).first, 1e-9);  // the prompt's last row sees exact keys
  // Of steps, with keys as they are in real models, which fill few directions. Random routers are near to a
  // choice of other experts much of the time, and a choice is a jump: measured .16 where a dense model of the
  // same size has .03.
  double kl[2] = {};
  for (const bool dense : {false, true}) {
    TinyModel m = experts();
    m.key_rank = 8;
    if (dense) {
      m.architecture = "qwen3";
      m.n_expert = m.n_used = 0;
    }
    const LoadedTiny loaded(m);
    auto exact = make_session(loaded.model), small = make_session(loaded.model, {.kv = "klt"});
    ASSERT_OK(exact->prefill(reference().prompt()));
    ASSERT_OK(small->prefill(reference().prompt()));
    const auto want = decode_all(*exact, reference().rest()), got = decode_all(*small, reference().rest());
    for (size_t i = 0; i < want.size(); ++i)
      kl[dense ? 1 : 0] += kl_divergence(want[i], got[i]) / static_cast<double>(want.size());
  }
  EXPECT_LT(kl[0], 8 * kl[1]) << kl[1];
}

class ExpertSessions : public ::testing::TestWithParam<std::string> {
 protected:
  std::unique_ptr<Session> session(bool segments = true) const {
    return make_session(tiny().model, {.kv = GetParam(), .n_threads = 2, .segments = segments});
  }
};

std::vector<std::vector<float>> read_on(Session& session, std::span<const Token> rest) {
  EXPECT_TRUE(session.prefill(rest).ok());
  std::vector<std::vector<float>> rows{copy(session.logits())};
  for (auto& row : decode_all(session, random_tokens(12, 77))) rows.push_back(std::move(row));
  return rows;
}

TEST_P(ExpertSessions, PrefixesAreSharedToTheLastBit) {
  std::vector<Token> first = random_tokens(1800, 5), second = first;
  for (const Token t : random_tokens(300, 101)) first.push_back(t);
  for (const Token t : random_tokens(250, 102)) second.push_back(t);
  auto fresh = session();
  const auto want = read_on(*fresh, second);
  auto read = session();
  read_on(*read, first);
  const int64_t n = read->kept_prefix(1800);
  ASSERT_GT(n, 0);
  auto other = session();
  ASSERT_OK(other->share_prefix(*read, n));
  read->keep_prefix(n);
  for (Session* s : {other.get(), read.get()})
    EXPECT_EQ(max_difference(want, read_on(*s, std::span(second).subspan(static_cast<size_t>(n)))), 0);
}

TEST_P(ExpertSessions, ASavedSessionGoesOn) {
  const TempDir dir;
  auto saved = session();
  const std::vector<Token> text = random_tokens(900, 5);
  ASSERT_OK(saved->prefill(text));
  ASSERT_OK(save_session(*saved, text, dir.path("s")));
  auto loaded = load_session(tiny().model, Access::impl(*saved).options, dir.path("s"));
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  const std::vector<Token> next = random_tokens(40, 6);
  EXPECT_EQ(max_difference(decode_all(*saved, next), decode_all(*loaded->session, next)), 0);
}

// Sequences of a batch choose the same experts and others; each has the bits that it has alone.
TEST_P(ExpertSessions, FourTogetherAreEachAlone) {
  auto batch = DecodeBatch::create(tiny().model, 4, 2);
  ASSERT_TRUE(batch.ok());
  std::vector<std::vector<Token>> prompts;
  for (uint32_t i = 0; i < 4; ++i) prompts.push_back(random_tokens(700 + 50 * i, i));
  SessionsTwice sessions(prompts, [this] { return session(false); });
  for (uint32_t k = 0; k < 20; ++k) {
    SCOPED_TRACE(k);
    ASSERT_NO_FATAL_FAILURE(sessions.step(**batch, random_tokens(4, 50 + k)));
  }
}

INSTANTIATE_TEST_SUITE_P(Profiles, ExpertSessions, ::testing::Values("f16", "klt"));

}  // namespace
}  // namespace narrows::testing
