// Models of gated DeltaNet and attention in whole sessions: long prompts and steps against libllama, with
// caches that compress; batches; snapshots: prefixes, chats, going back, saved sessions, to the last bit
// where that is promised; how many tokens a chat reads; memory.
#include <gtest/gtest.h>

#include "engine/session_impl.h"
#include "narrows/session_file.h"
#include "support/llama_reference.h"
#include "support/sanitized.h"
#include "support/session.h"
#include "temp_dir.h"

namespace narrows::testing {
namespace {

TinyModel hybrid(const std::string& architecture = "qwen35") {
  TinyModel m;
  m.architecture = architecture;
  m.n_layer = 4;
  m.attends_in = 4;
  m.head_dim = 32;
  m.n_rot = 12;
  m.n_ctx = 32768;
  m.freq_base = 1e6;
  if (architecture == "qwen35") return m;
  m.n_expert = 8;
  m.n_used = 3;
  m.n_ff = 48;
  m.n_shared_ff = 40;
  return m;
}

const LoadedTiny& tiny() {
  static const LoadedTiny loaded(hybrid());
  return loaded;
}

std::unique_ptr<Session> session_of(const std::string& profile, bool segments, int n_threads = 2) {
  return make_session(tiny().model, {.kv = profile, .n_threads = n_threads, .segments = segments});
}

std::span<const Token> from(const std::vector<Token>& tokens, int64_t n) {
  return std::span(tokens).subspan(static_cast<size_t>(n));
}

std::vector<Token> joined(std::vector<Token> a, const std::vector<Token>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

class Hybrid : public ::testing::TestWithParam<std::string> {};

TEST_P(Hybrid, PromptsAndStepsAreLibllamas) {
  constexpr int64_t kPrompt = 1300, kTokens = 1400;
  const LoadedTiny loaded(hybrid(GetParam()));
  const std::vector<Token> tokens = random_tokens(kTokens);
  const LogitRows exact = llama_logits(loaded.path, tokens, LlamaWay::exact);
  for (const char* const profile : {"f16", "klt"}) {
    auto session = make_session(loaded.model, {.kv = profile, .n_threads = 2});
    ASSERT_OK(session->prefill(std::span(tokens).first(kPrompt)));
    // A prompt's rows see exact keys with every profile.
    EXPECT_LT(kl_divergence(exact.row(kPrompt - 1), session->logits()), 1e-9) << profile;
    EXPECT_LT(max_difference(exact.row(kPrompt - 1), session->logits()), 2e-4) << profile;
    if (std::string(profile) != "f16") continue;
    double kl = 0, most = 0;
    const auto rows = decode_all(*session, from(tokens, kPrompt));
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto want = exact.row(kPrompt + static_cast<int64_t>(i));
      kl += kl_divergence(want, rows[i]) / static_cast<double>(rows.size());
      most = std::max(most, max_difference(want, rows[i]));
    }
    EXPECT_LT(kl, 1e-5);
    EXPECT_LT(most, 0.05);
    RecordProperty("steps_kl", std::to_string(kl));
    RecordProperty("steps_largest_difference", std::to_string(most));
  }
}

// Loaded layers round weights to bfloat16 where the CPU multiplies that; float32 ones stay.
TEST_P(Hybrid, OtherPrecisionsOfAPromptAreNear) {
  const LoadedTiny loaded(hybrid(GetParam()));
  const std::vector<Token> tokens = random_tokens(700);
  std::vector<std::vector<float>> last;
  for (const PromptOptions& prompt :
       {PromptOptions{PrefillProducts::int8, PrefillAttention::f32},
        PromptOptions{PrefillProducts::bf16, PrefillAttention::f32}, PromptOptions{}}) {
    auto session = make_session(loaded.model, {.n_threads = 2, .prompt = prompt});
    ASSERT_OK(session->prefill(tokens));
    last.push_back(copy(session->logits()));
  }
  EXPECT_LT(kl_divergence(last[0], last[1]), 1e-6);
  EXPECT_LT(kl_divergence(last[0], last[2]), 1e-3);
}

// Both engines round activations to 8 bits: neither is further from products that round nothing.
TEST_P(Hybrid, QuantisedOnesAreAsNearAsLibllamas) {
  double ours = 0, libllamas = 0;
  for (const ggml_type type : {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
    for (const uint32_t seed : {1, 2, 3, 4}) {
      TinyModel m = hybrid(GetParam());
      m.type = type;
      m.seed = seed;
      m.delta_dim = 32;
      if (m.n_expert > 0) {  // else what rounding changes of the choice is more than all else
        m.n_used = m.n_expert = 4;
        m.n_ff = m.n_shared_ff = 64;
        m.router_gain = 0.3;
      }
      const LoadedTiny packed(m), floats(m, {.float_weights = true});
      const std::vector<Token> tokens = random_tokens(160);
      const LogitRows theirs = llama_logits(packed.path, tokens, LlamaWay::exact);
      auto session = make_session(packed.model), unrounded = make_session(floats.model);
      for (const int64_t n : {40, 90, 140}) {
        session->reset();
        unrounded->reset();
        ASSERT_OK(session->prefill(std::span(tokens).first(static_cast<size_t>(n))));
        ASSERT_OK(unrounded->prefill(std::span(tokens).first(static_cast<size_t>(n))));
        ours += kl_divergence(unrounded->logits(), session->logits());
        libllamas += kl_divergence(unrounded->logits(), theirs.row(n - 1));
      }
      for (int64_t i = 140; i < 160; ++i) {
        ASSERT_OK(session->decode(tokens[static_cast<size_t>(i)]));
        ASSERT_OK(unrounded->decode(tokens[static_cast<size_t>(i)]));
        ours += kl_divergence(unrounded->logits(), session->logits());
        libllamas += kl_divergence(unrounded->logits(), theirs.row(i));
      }
    }
  }
  EXPECT_LT(ours, 1.3 * libllamas);
}

INSTANTIATE_TEST_SUITE_P(Architectures, Hybrid, ::testing::Values("qwen35", "qwen35moe", "qwen3next"));

// What the cache of the one layer that attends loses is all that is lost.
TEST(HybridCache, CompressesTheLayersThatAttendAlone) {
  TinyModel m = hybrid();
  m.key_rank = 8;  // keys fill few directions, as in real models
  const LoadedTiny loaded(m);
  const std::vector<Token> text = random_tokens(1500), next = random_tokens(60, 3);
  auto exact = make_session(loaded.model);
  ASSERT_OK(exact->prefill(text));
  const auto want = decode_all(*exact, next);
  for (const char* const profile : {"klt", "kivi-4"}) {
    auto session = make_session(loaded.model, {.kv = profile});
    ASSERT_OK(session->prefill(text));
    const auto got = decode_all(*session, next);
    double kl = 0;
    for (size_t i = 0; i < want.size(); ++i)
      kl += kl_divergence(want[i], got[i]) / static_cast<double>(want.size());
    EXPECT_LT(kl, 0.05) << profile;
    const KvCache& cache = *Access::impl(*session).cache;
    EXPECT_EQ(cache.stats().n_layer_compressed, 1) << profile;
    EXPECT_EQ(cache.layer(0).bytes().pages, 0) << profile;
  }
}

TEST(HybridCache, MemoryIsReckonedBeforehand) {
  for (const bool segments : {false, true}) {
    for (const char* const profile : {"f16", "klt"}) {
      auto session = session_of(profile, segments);
      ASSERT_OK(session->prefill(random_tokens(3000)));
      const int64_t estimate = cache_bytes_estimate(*tiny().model, kv(profile), 3000, segments);
      EXPECT_LE(session->cache_stats().bytes, estimate) << profile << segments;
      EXPECT_GT(session->cache_stats().bytes, estimate / 2) << profile << segments;
      // A state's size is that of the model, however long the text.
      const int64_t state = Access::impl(*session).cache->layer(0).bytes().total();
      ASSERT_OK(session->prefill(random_tokens(3000, 2)));
      decode_all(*session, random_tokens(600, 3));
      EXPECT_LE(Access::impl(*session).cache->layer(0).bytes().total(), state * 5 / 3) << profile << segments;
    }
  }
}

class HybridSessions : public ::testing::TestWithParam<std::string> {
 protected:
  std::unique_ptr<Session> session(bool segments = true) const { return session_of(GetParam(), segments); }
};

std::vector<std::vector<float>> read_on(Session& session, std::span<const Token> rest) {
  EXPECT_TRUE(session.prefill(rest).ok());
  std::vector<std::vector<float>> rows{copy(session.logits())};
  for (auto& row : decode_all(session, random_tokens(12, 77))) rows.push_back(std::move(row));
  return rows;
}

// The next question about a text, in the same session and in another one.
TEST_P(HybridSessions, AnotherPromptGoesOnFromASnapshot) {
  for (const int64_t common : {700, 2700, 4900}) {
    const std::vector<Token> text = random_tokens(common, 5);
    const std::vector<Token> first = joined(text, random_tokens(60, 101)),
                             second = joined(text, random_tokens(300, 102));
    auto fresh = session();
    const auto want = read_on(*fresh, second);
    auto read = session();
    read_on(*read, first);
    decode_all(*read, random_tokens(700, 9));
    const int64_t n = read->kept_prefix(common);
    ASSERT_GE(n, common - 512) << common;
    auto other = session();
    ASSERT_OK(other->share_prefix(*read, n));
    EXPECT_EQ(max_difference(want, read_on(*other, from(second, n))), 0) << common << ", shared at " << n;
    // That did not touch the state of the first.
    read->keep_prefix(n);
    EXPECT_EQ(max_difference(want, read_on(*read, from(second, n))), 0) << common << ", kept " << n;
  }
}

// A place without a snapshot is none: all is read again, and nothing is made of a wrong state.
TEST_P(HybridSessions, WithoutASnapshotAllIsReadAgain) {
  std::vector<Token> text = random_tokens(6000, 5);
  for (const bool segments : {false, true}) {
    auto read = session(segments);
    ASSERT_OK(read->prefill(text));
    std::vector<Token> other(text.begin(), text.begin() + 2000);
    const int64_t n = read->go_back(1000);
    EXPECT_EQ(n, 0);
    EXPECT_EQ(read->n_past(), 0);
    auto fresh = session(segments);
    EXPECT_EQ(max_difference(read_on(*fresh, other), read_on(*read, from(other, n))), 0);
  }
}

TEST_P(HybridSessions, SavedSessionsGoOn) {
  const TempDir dir;
  for (const bool segments : {false, true}) {
    auto saved = session(segments);
    const std::vector<Token> text = random_tokens(2000, 5);
    ASSERT_OK(saved->prefill(text));
    ASSERT_OK(save_session(*saved, text, dir.path("s")));
    auto loaded = load_session(tiny().model, Access::impl(*saved).options, dir.path("s"));
    ASSERT_TRUE(loaded.ok()) << loaded.status().message();
    EXPECT_EQ(loaded->session->kept_prefix(2000), saved->kept_prefix(2000));
    EXPECT_EQ(loaded->session->cache_stats().bytes, saved->cache_stats().bytes);
    const std::vector<Token> next = random_tokens(300, 6);
    EXPECT_EQ(max_difference(decode_all(*saved, next), decode_all(*loaded->session, next)), 0);
  }
}

TEST_P(HybridSessions, FourTogetherAreEachAlone) {
  auto batch = DecodeBatch::create(tiny().model, 4, 2);
  ASSERT_TRUE(batch.ok());
  std::vector<std::vector<Token>> prompts;
  for (uint32_t i = 0; i < 4; ++i) prompts.push_back(random_tokens(500 + 150 * i, i));
  SessionsTwice sessions(prompts, [this] { return session(false); });
  for (uint32_t k = 0; k < 20; ++k) {
    SCOPED_TRACE(k);
    ASSERT_NO_FATAL_FAILURE(sessions.step(**batch, random_tokens(4, 50 + k)));
  }
}

TEST_P(HybridSessions, ThreadsMakeNoDifference) {
  std::vector<std::vector<std::vector<float>>> rows;
  for (const int n_threads : {1, 2, 3}) {
    auto s = session_of(GetParam(), true, n_threads);
    rows.push_back(read_on(*s, random_tokens(900, 5)));
  }
  EXPECT_EQ(max_difference(rows[0], rows[1]), 0);
  EXPECT_EQ(max_difference(rows[0], rows[2]), 0);
}

// A prompt that is given up half way leaves what was there before.
TEST_P(HybridSessions, AStoppedPromptLeavesWhatWasThere) {
  const std::vector<Token> text = random_tokens(9 * 512, 5);
  auto read = session();
  ASSERT_OK(read->prefill(std::span(text).first(1500)));
  const int64_t before = read->kept_prefix(1500);
  ASSERT_GT(before, 1000);
  read->keep_prefix(before);
  ASSERT_OK(read->begin_prefill(from(text, before)));
  for (int i = 0; i < 20; ++i) ASSERT_OK(read->prefill_step());
  EXPECT_EQ(read->go_back(before), before);
  auto fresh = session();
  const std::vector<Token> shorter(text.begin(), text.begin() + 2000);
  EXPECT_EQ(max_difference(read_on(*fresh, shorter), read_on(*read, from(shorter, before))), 0);
  // Without segments a state that has read on is lost, and so all of it.
  auto plain = session(false);
  ASSERT_OK(plain->prefill(std::span(text).first(200)));
  ASSERT_OK(plain->begin_prefill(from(text, 200)));
  for (int i = 0; i < 5; ++i) ASSERT_OK(plain->prefill_step());
  EXPECT_EQ(plain->go_back(200), 0);
}

/// What a chat of five turns over a long text reads. rewrites: its template drops the thoughts of an answer
/// once that is history, and what its prompts end with.
struct ChatOfFiveTurns {
  explicit ChatOfFiveTurns(bool template_rewrites, int64_t answer_tokens)
      : rewrites(template_rewrites), n_answer(answer_tokens) {}

  static constexpr int64_t kText = kSanitized ? 3000 : 12000;
  static constexpr int64_t kEnd = 5;  ///< tokens of a prompt's end that history lacks

  /// The prompt of turn i: the text and all questions and answers before, as history has them.
  std::vector<Token> prompt(uint32_t i) const {
    std::vector<Token> all = random_tokens(kText, 5);
    for (uint32_t turn = 0; turn <= i; ++turn) {
      all = joined(std::move(all), random_tokens(40, 200 + turn));
      if (turn == i) break;
      if (!rewrites) all = joined(std::move(all), random_tokens(kEnd, 99));
      const std::vector<Token> answer = random_tokens(n_answer, 300 + turn);
      all.insert(all.end(), answer.begin() + (rewrites ? n_answer / 2 : 0), answer.end());
    }
    return joined(std::move(all), random_tokens(kEnd, 99));
  }

  bool rewrites;
  int64_t n_answer;
};

int64_t common_tokens(const std::vector<Token>& a, const std::vector<Token>& b) {
  const auto n = static_cast<std::ptrdiff_t>(std::min(a.size(), b.size()));
  return std::mismatch(a.begin(), a.begin() + n, b.begin()).first - a.begin();
}

// As `run` does it: a turn goes on where it can, else back to the last token in common.
TEST_P(HybridSessions, AChatReadsNewTokensAndFewMore) {
  for (const auto& [rewrites, n_answer] : {std::pair(false, int64_t{300}), {true, 300}, {true, 700}}) {
    const ChatOfFiveTurns chat(rewrites, n_answer);
    auto s = session(false);
    std::vector<Token> held, before;
    for (uint32_t turn = 0; turn < 5; ++turn) {
      const std::vector<Token> prompt = chat.prompt(turn);
      const int64_t n_new = static_cast<int64_t>(prompt.size()) - common_tokens(prompt, before);
      held.resize(static_cast<size_t>(s->go_back(common_tokens(prompt, held))));
      const int64_t n_read = static_cast<int64_t>(prompt.size() - held.size());
      EXPECT_LE(n_read, n_new + 512) << "turn " << turn;
      ASSERT_OK(s->prefill(from(prompt, static_cast<int64_t>(held.size()))));
      if (turn == 4) {
        auto fresh = session(false);
        ASSERT_OK(fresh->prefill(prompt));
        // f16 rounds what a later prompt attends to, klt keeps less of it.
        EXPECT_LT(kl_divergence(fresh->logits(), s->logits()), GetParam() == "f16" ? 1e-5 : 0.5);
      }
      const std::vector<Token> answer = random_tokens(n_answer, 300 + turn);
      for (const Token t : answer) ASSERT_OK(s->decode(t));
      held = joined(prompt, answer);
      before = prompt;
    }
  }
}

// As `serve` does it: to the last end of a segment in common; the slot saved and restored in between.
TEST_P(HybridSessions, AServedChatReadsNewTokensAndFewMore) {
  const TempDir dir;
  const ChatOfFiveTurns chat(true, 300);
  auto s = session();
  std::vector<Token> held, before;
  for (uint32_t turn = 0; turn < 5; ++turn) {
    const std::vector<Token> prompt = chat.prompt(turn);
    const int64_t n_new = static_cast<int64_t>(prompt.size()) - common_tokens(prompt, before);
    const int64_t n = s->kept_prefix(common_tokens(prompt, held));
    if (n > 0) {
      s->keep_prefix(n);
    } else {
      s->reset();
    }
    EXPECT_LE(static_cast<int64_t>(prompt.size()) - n, n_new + 512) << "turn " << turn;
    ASSERT_OK(s->prefill(from(prompt, n)));
    if (turn == 4) {
      auto fresh = session();
      ASSERT_OK(fresh->prefill(prompt));
      EXPECT_EQ(max_difference(fresh->logits(), s->logits()), 0);
    }
    const std::vector<Token> answer = random_tokens(300, 300 + turn);
    for (const Token t : answer) ASSERT_OK(s->decode(t));
    held = joined(prompt, answer);
    before = prompt;
    if (turn % 2 == 1) continue;
    ASSERT_OK(save_session(*s, held, dir.path("slot")));
    auto loaded = load_session(tiny().model, Access::impl(*s).options, dir.path("slot"));
    ASSERT_TRUE(loaded.ok()) << loaded.status().message();
    s = std::move(loaded->session);
  }
  // Another conversation about the same text finds where the first one's prompt ended.
  const std::vector<Token> other = joined(random_tokens(ChatOfFiveTurns::kText, 5), random_tokens(80, 999));
  EXPECT_GE(s->kept_prefix(common_tokens(other, held)), ChatOfFiveTurns::kText - 512);
}

INSTANTIATE_TEST_SUITE_P(Profiles, HybridSessions, ::testing::Values("f16", "klt"));

TEST(HybridModel, SaysWhatItLeavesOutAndWhatItIs) {
  TinyModel m = hybrid();
  m.n_nextn = 1;
  const LoadedTiny loaded(m);
  ASSERT_EQ(loaded.model->info().warnings.size(), 1U);
  EXPECT_NE(loaded.model->info().warnings[0].find("1 of its layers predicts further tokens"),
            std::string::npos);
  EXPECT_EQ(loaded.model->info().n_layer, 4);
  EXPECT_EQ(loaded.model->info().n_layer_recurrent, 3);
  EXPECT_TRUE(tiny().model->info().warnings.empty());
}

}  // namespace
}  // namespace narrows::testing
