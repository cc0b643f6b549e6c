// The memory ledger of models and sessions: everything is counted, once, refused before it begins, and given
// back.
#include <gtest/gtest.h>
#include <malloc.h>

#include <filesystem>

#include "base/memory_ledger.h"
#include "engine/session_impl.h"
#include "narrows/session_file.h"
#include "support/refusal.h"
#include "support/sanitized.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

TinyModel four_layers() {
  TinyModel m;
  m.n_layer = 4;
  m.n_ctx = 8192;
  return m;
}

const LoadedTiny& tiny() {
  static const LoadedTiny loaded(four_layers());
  return loaded;
}

const std::vector<Token>& tokens() {
  static const std::vector<Token> all = random_tokens(4000);
  return all;
}

std::span<const Token> part(int64_t from, int64_t to) {
  return std::span(tokens()).subspan(static_cast<size_t>(from), static_cast<size_t>(to - from));
}

/// No limit once it goes.
struct Limit {
  explicit Limit(int64_t bytes) { set_memory_limit(bytes); }
  Limit(const Limit&) = delete;
  Limit& operator=(const Limit&) = delete;
  ~Limit() { set_memory_limit(0); }
};

int64_t in_use() {
  const MemoryStats m = memory_stats();
  return m.weights + m.caches + m.scratch + m.prompts + m.files;
}

TEST(Memory, WeightsCountWhileTheModelLives) {
  const int64_t before = memory_stats().weights;
  {
    const LoadedTiny other(four_layers());
    EXPECT_EQ(memory_stats().weights - before, parts_of(*other.model).weights->allocated_bytes());
  }
  EXPECT_EQ(memory_stats().weights, before);
}

TEST(Memory, AModelIsRefusedByTheLimit) {
  TempDir dir;
  const std::string path = four_layers().write(dir.path("tiny.gguf"));
  const int64_t before = in_use();
  {
    const Limit limit(before + 1'000'000);
    const auto loaded = Model::load(path);
    ASSERT_FALSE(loaded.ok());
    expect_refusal(loaded.status(), StatusCode::out_of_memory, {"tiny.gguf", "GB"});
  }
  EXPECT_EQ(in_use(), before);
}

TEST(Memory, WhatACacheHoldsIsPromised) {
  for (const char* profile : thinned<const char*>({"f16", "kivi-2", "sals-25", "klt", "klt-10x"})) {
    for (const bool segments : {false, true}) {
      SCOPED_TRACE(std::string(profile) + (segments ? " in segments" : ""));
      ASSERT_TRUE(tiny().model);
      const int64_t before = memory_stats().caches;
      {
        auto session = make_session(tiny().model, {.kv = profile, .segments = segments});
        const auto promised = [&] { return memory_stats().caches - before; };
        for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, 300}, {300, 3000}}) {
          ASSERT_OK(session->prefill(part(from, to)));
          EXPECT_GE(promised(), session->cache_stats().bytes);
          EXPECT_EQ(memory_stats().prompts, 0);
          for (int64_t i = 0; i < 40; ++i) ASSERT_OK(session->decode(tokens()[static_cast<size_t>(i)]));
          EXPECT_GE(promised(), session->cache_stats().bytes);
          // And not much more: these and the next 512 tokens, which steps claim, as exact ones at most, and
          // what pages have grown by since.
          const Session::Impl& m = Access::impl(*session);
          const int64_t n = session->n_past() + 512;
          EXPECT_LE(promised(),
                    std::max(cache_bytes_estimate(*tiny().model, kv(profile), n, segments),
                             kv_exact_bytes(kv_layers(parts_of(*tiny().model).spec()), m.options.kv, n)) +
                        40 * 4 * 2 * m.cache->layer(0).shape().width() * 2);
        }
        session->reset();
        EXPECT_EQ(promised(), session->cache_stats().bytes);
      }
      EXPECT_EQ(memory_stats().caches, before);
    }
  }
}

TEST(Memory, WorkSpaceOfAPromptCountsWhileItIsRead) {
  auto session = make_session(tiny().model);
  ASSERT_OK(session->begin_prefill(part(0, 2000)));
  const AttentionSpec& a = parts_of(*tiny().model).spec().layer(0).attention;
  EXPECT_GE(memory_stats().prompts,
            2000 * (tiny().model->info().n_embd + 2 * a.width_kv()) * int64_t{sizeof(float)});
  ASSERT_OK(session->prefill_step());
  session->reset();
  EXPECT_EQ(memory_stats().prompts, 0);
}

TEST(Memory, APromptThatDoesNotFitIsRefusedAndClaimsNothing) {
  auto session = make_session(tiny().model);
  ASSERT_OK(session->prefill(part(0, 100)));
  const std::vector<float> logits = copy(session->logits());
  const int64_t before = in_use();
  {
    const Limit limit(before + 100'000);
    expect_refusal(session->prefill(part(100, 3000)), StatusCode::out_of_memory, {"2900", "GB", "f16"});
    EXPECT_EQ(in_use(), before);
    EXPECT_EQ(session->n_past(), 100);
    EXPECT_EQ(max_difference(session->logits(), logits), 0);
    auto other = make_session(tiny().model, {.kv = "klt"});
    auto third = make_session(tiny().model, {.kv = "sals-25"});
    Session* both[] = {other.get(), third.get()};
    expect_refusal(Session::prefill_together(both, part(0, 3000)), StatusCode::out_of_memory, {"3000"});
  }
  EXPECT_EQ(in_use(), before);
  ASSERT_OK(session->prefill(part(100, 3000)));
}

/// Steps until one is refused; the room of blocks that are there already serves a few.
Status step_until_refused(Session& session) {
  for (int64_t i = session.n_past();; ++i) {
    if (Status s = session.decode(tokens()[static_cast<size_t>(i)]); !s.ok()) return s;
    if (i > 1000) return {};
  }
}

TEST(Memory, AStepThatDoesNotFitIsRefusedAndMayBeTriedAgain) {
  auto session = make_session(tiny().model), same = make_session(tiny().model);
  ASSERT_OK(session->prefill(part(0, 100)));
  ASSERT_OK(same->prefill(part(0, 100)));
  {
    const Limit limit(in_use() + 1);
    expect_refusal(step_until_refused(*session), StatusCode::out_of_memory, {"GB", "--kv"});
    EXPECT_LT(session->n_past(), 200);
  }
  decode_all(*same, part(100, session->n_past()));
  const auto next = part(session->n_past(), session->n_past() + 4);
  const auto again = decode_all(*session, next), reference = decode_all(*same, next);
  for (size_t i = 0; i < again.size(); ++i) EXPECT_EQ(max_difference(again[i], reference[i]), 0);
}

TEST(Memory, InABatchOnlyTheSessionThatDoesNotFitFails) {
  auto fits = make_session(tiny().model), does_not = make_session(tiny().model);
  ASSERT_OK(fits->prefill(part(0, 50)));
  ASSERT_OK(does_not->prefill(part(0, 100)));
  for (int i = 0; i < 20; ++i) ASSERT_OK(fits->decode(tokens()[50]));  // claims for 512 steps
  auto batch = DecodeBatch::create(tiny().model, 2, 1);
  ASSERT_TRUE(batch.ok());
  const Limit limit(in_use() + 1);
  Session* sessions[] = {does_not.get(), fits.get()};
  const Token next[] = {tokens()[100], tokens()[51]};
  Status each[2];
  for (int i = 0; i < 100 && each[0].ok(); ++i) {  // blocks that are there already serve a few
    ASSERT_OK((*batch)->decode(sessions, next, each));
    EXPECT_OK(each[1]);
  }
  EXPECT_EQ(each[0].code(), StatusCode::out_of_memory);
}

TEST(Memory, SharedPagesCountOnce) {
  for (const char* profile : {"f16", "klt"}) {
    SCOPED_TRACE(profile);
    auto first = make_session(tiny().model, {.kv = profile, .segments = true});
    auto second = make_session(tiny().model, {.kv = profile, .segments = true});
    ASSERT_OK(first->prefill(part(0, 3500)));
    const int64_t n = first->kept_prefix(first->n_past());
    ASSERT_GT(n, 2000);
    const int64_t before = memory_stats().caches;
    ASSERT_OK(second->share_prefix(*first, n));
    const int64_t more = memory_stats().caches - before;
    const int64_t shared = Access::impl(*second).cache->bytes_in_stores();
    EXPECT_GT(shared, 100'000);
    EXPECT_LE(more, cache_bytes_estimate(*tiny().model, kv(profile), n, true) - shared);
    // Who remains holds them.
    first.reset();
    EXPECT_GE(memory_stats().caches, second->cache_stats().bytes);
    second.reset();
  }
  EXPECT_EQ(memory_stats().caches, 0);
}

TEST(Memory, ARestoredSessionCounts) {
  TempDir dir;
  const std::string path = dir.path("s.session");
  int64_t bytes = 0;
  {
    auto session = make_session(tiny().model, {.kv = "klt", .segments = true});
    ASSERT_OK(session->prefill(part(0, 3000)));
    ASSERT_OK(save_session(*session, part(0, 3000), path));
    bytes = session->cache_stats().bytes;
  }
  const int64_t before = memory_stats().caches;
  SessionOptions options;
  options.n_threads = 1;
  {
    const Limit limit(in_use() + static_cast<int64_t>(std::filesystem::file_size(path)) + bytes / 2);
    const auto refused = load_session(tiny().model, options, path);
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.status().code(), StatusCode::out_of_memory) << refused.status().message();
    EXPECT_EQ(memory_stats().caches, before);
  }
  auto restored = load_session(tiny().model, options, path);
  ASSERT_TRUE(restored.ok()) << restored.status().message();
  EXPECT_GE(memory_stats().caches - before, restored->session->cache_stats().bytes);
  EXPECT_EQ(memory_stats().files, 0);
}

/// Bytes that malloc has given away; 0 where a sanitizer has taken its place.
int64_t allocated() {
  const auto info = mallinfo2();
  return static_cast<int64_t>(info.uordblks + info.hblkhd);
}

TEST(Memory, StepsWorkInAboutWhatIsPromised) {
  if (allocated() == 0) GTEST_SKIP() << "malloc does not say";
  for (const char* profile : {"f16", "sals-25", "klt"}) {
    for (const int n_threads : {1, 4}) {
      SCOPED_TRACE(std::string(profile) + " " + std::to_string(n_threads));
      auto session = make_session(tiny().model, {.kv = profile, .n_threads = n_threads});
      ASSERT_OK(session->prefill(part(0, 4000)));
      Session::Impl& m = Access::impl(*session);
      const MemoryEstimate estimate = memory_estimate(*tiny().model, m.options, session->n_past(), n_threads);
      const int64_t before = allocated(), cache_before = session->cache_stats().bytes;
      m.scratch.reset();
      std::vector<AttentionShape> shapes;
      for (int64_t i = 0; i < 4; ++i) shapes.push_back(attention_shape(parts_of(*tiny().model).spec(), i));
      const int64_t without = allocated();
      m.scratch = std::make_unique<StepScratch>(shapes, n_threads);
      for (int64_t i = 0; i < m.cache->n_layer(); ++i) ASSERT_OK(m.cache->layer(i).begin_step(*m.scratch));
      const int64_t more_cache = session->cache_stats().bytes - cache_before;
      const double took = static_cast<double>(allocated() - without - more_cache);
      EXPECT_LT(without, before);
      constexpr double kOfMalloc = 20'000;  // some hundred small allocations
      EXPECT_LT(took, 1.1 * static_cast<double>(estimate.scratch) + kOfMalloc);
      EXPECT_GT(took, 0.5 * static_cast<double>(estimate.scratch));
    }
  }
}

}  // namespace
}  // namespace narrows::testing
