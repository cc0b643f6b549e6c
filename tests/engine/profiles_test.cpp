// Every profile in a whole session: far beyond its thresholds in the prompt and in steps, its bytes, its
// distance to f16, and SALS where it must be right: keys of low rank.
//
// Distances are mean KL divergences to an f16 session fed with the same 200 tokens. Measured on these models
// (rank 0 is a K weight without structure, the worst that can be): kivi-4 .02 to .03, kivi-2 .5 to .7,
// sals-25 .03 to .07, sals-12.5 .04 to .08; with keys of rank 8 = D/4 sals-25:budget=all .0002 to .0006.
#include <gtest/gtest.h>

#include "engine/session_impl.h"
#include "narrows/session_file.h"
#include "support/sanitized.h"
#include "support/session.h"
#include "temp_dir.h"

namespace narrows::testing {
namespace {

TinyModel four_layers(int64_t key_rank = 0) {
  TinyModel m;
  m.n_layer = 4;  // layers 0, 1 and 3 of SALS profiles are dense, layer 2 is compressed
  m.key_rank = key_rank;
  return m;
}

const LoadedTiny& full_rank() {
  static const LoadedTiny loaded(four_layers());
  return loaded;
}

const LoadedTiny& low_rank() {
  static const LoadedTiny loaded(four_layers(8));
  return loaded;
}

const std::vector<Token>& tokens() {
  static const std::vector<Token> all = random_tokens(1500);
  return all;
}

std::span<const Token> part(int64_t from, int64_t to) {
  return std::span(tokens()).subspan(static_cast<size_t>(from), static_cast<size_t>(to - from));
}

/// Mean divergence to f16 over 200 tokens decoded after a prompt of n.
double distance(const LoadedTiny& tiny, const std::string& kv, int64_t n) {
  auto reference = make_session(tiny.model), session = make_session(tiny.model, {.kv = kv});
  EXPECT_TRUE(
      Session::prefill_together(std::vector<Session*>{reference.get(), session.get()}, part(0, n)).ok());
  double kl = 0;
  for (int64_t i = n; i < n + 200; ++i) {
    const Token t = tokens()[static_cast<size_t>(i)];
    EXPECT_TRUE(reference->decode(t).ok());
    EXPECT_TRUE(session->decode(t).ok());
    kl += kl_divergence(reference->logits(), session->logits()) / 200;
  }
  return kl;
}

class Profiles : public ::testing::TestWithParam<std::string> {};

std::string profile_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  return name;
}

void expect_consistent(const Session& session, const ModelInfo& info) {
  const CacheStats s = session.cache_stats();
  const KvProfile& p = session.profile();
  const int64_t a_token = info.n_head_kv * info.head_dim * 2 * 2;  // f16 bytes of a layer
  int64_t compressed = 0;
  for (int64_t i = 0; i < info.n_layer; ++i) compressed += p.layer_is_dense(i, info.n_layer) ? 0 : 1;
  EXPECT_EQ(s.n_tokens, session.n_past());
  EXPECT_EQ(s.n_layer_compressed, compressed);
  EXPECT_EQ(s.bytes_f16, s.n_tokens * a_token * info.n_layer);
  EXPECT_EQ(s.bytes_f16_compressed_layers, s.n_tokens * a_token * compressed);
  EXPECT_LE(s.bytes_pages, s.bytes_compressed_layers);
  EXPECT_LE(s.bytes_f16_pages, s.bytes_f16_compressed_layers);
  EXPECT_EQ(s.bytes_pages == 0, s.bytes_f16_pages == 0);
  // Dense layers are rounded up to whole blocks of a tile.
  const int64_t dense = s.bytes - s.bytes_compressed_layers;
  EXPECT_GE(dense, (info.n_layer - compressed) * s.n_tokens * a_token);
  EXPECT_LE(dense, (info.n_layer - compressed) * (s.n_tokens + 64) * a_token);
  if (compressed == 0) {
    EXPECT_EQ(s.bytes_compressed_layers, 0);
    EXPECT_EQ(s.bytes_pages, 0);
  }
}

TEST_P(Profiles, GrowInStepsPastEveryThreshold) {
  auto session = make_session(full_rank().model, {.kv = GetParam()});
  const ModelInfo& info = full_rank().model->info();
  ASSERT_OK(session->prefill(part(0, 1)));
  int64_t pages_before = 0;
  for (int64_t i = 1; i < 800; ++i) {  // SALS and klt compute their bases at 512
    ASSERT_OK(session->decode(tokens()[static_cast<size_t>(i)]));
    ASSERT_TRUE(all_finite(session->logits())) << i;
    ASSERT_EQ(session->n_past(), i + 1);
    const int64_t pages = session->cache_stats().bytes_f16_pages;
    ASSERT_GE(pages, pages_before) << "a token came back out of the pages at " << i;
    pages_before = pages;
    if (i % 37 == 0 || (i > 505 && i < 520)) expect_consistent(*session, info);
  }
  const bool compresses = GetParam() != "f16";
  EXPECT_EQ(pages_before > 0, compresses);
  if (compresses) {
    // All but the sinks, the recent ones and what waits to be a whole unit of 16, 32 or 64 tokens.
    const CacheStats s = session->cache_stats();
    const KvProfile& p = session->profile();
    const int64_t encoded = 800 * s.bytes_f16_pages / s.bytes_f16_compressed_layers;
    EXPECT_LE(encoded, 800 - p.n_sink - p.n_recent);
    EXPECT_GT(encoded, 800 - p.n_sink - p.n_recent - (p.kind == KvKind::klt ? 65 : 33));
    EXPECT_LT(s.bytes_compressed_layers - s.bytes_hot, s.bytes_f16_compressed_layers * 2 / 3);
  }
}

TEST_P(Profiles, ContinueALongPromptAndASecondOne) {
  auto session = make_session(full_rank().model, {.kv = GetParam()});
  ASSERT_OK(session->prefill(part(0, 700)));
  expect_consistent(*session, full_rank().model->info());
  decode_all(*session, part(700, 740));
  EXPECT_TRUE(all_finite(session->logits()));
  ASSERT_OK(session->prefill(part(740, 1300)));  // attends to what the pages give back
  EXPECT_TRUE(all_finite(session->logits()));
  decode_all(*session, part(1300, 1330));
  EXPECT_TRUE(all_finite(session->logits()));
  EXPECT_EQ(session->n_past(), 1330);
  expect_consistent(*session, full_rank().model->info());
}

// A layer's transforms take as long as a few steps on a large model, so steps make them a layer at a time;
// what is not converted yet is exact. A session saved in between goes on as if it had not been.
TEST(Conversion, TakesAStepALayer) {
  for (const char* const profile : {"klt", "sals-25"}) {
    TinyModel m = four_layers();
    m.n_layer = 7;  // four that SALS compresses
    const LoadedTiny tiny(m);
    auto session = make_session(tiny.model, {.kv = profile});
    const KvCache& cache = *Access::impl(*session).cache;
    const auto converted = [&cache] {
      int n = 0;
      for (int64_t i = 0; i < cache.n_layer(); ++i) n += cache.layer(i).bytes().n_tokens_in_pages > 0;
      return n;
    };
    ASSERT_OK(session->prefill(part(0, 500)));
    ASSERT_EQ(converted(), 0);
    std::unique_ptr<Session> restored;
    int most = 0;
    for (int64_t i = 500; i < 560; ++i) {
      const int before = converted();
      ASSERT_OK(session->decode(tokens()[static_cast<size_t>(i)]));
      most = std::max(most, converted() - before);
      if (restored) {
        ASSERT_OK(restored->decode(tokens()[static_cast<size_t>(i)]));
        ASSERT_TRUE(
            std::equal(session->logits().begin(), session->logits().end(), restored->logits().begin()))
            << profile << ", token " << i;
      } else if (before == 2) {
        const TempDir dir;
        const std::string path = dir.path("half.session");
        ASSERT_OK(save_session(*session, part(0, i + 1), path));
        auto saved = load_session(tiny.model, Access::impl(*session).options, path);
        ASSERT_TRUE(saved.ok()) << saved.status().message();
        restored = std::move(saved->session);
      }
    }
    EXPECT_EQ(most, 1) << profile;
    EXPECT_EQ(converted(), profile == std::string("klt") ? 7 : 4);
    EXPECT_NE(restored, nullptr);
  }
}

// What inspect prints and what the memory check relies on.
TEST_P(Profiles, TheEstimateIsWhatAPromptTakes) {
  auto session = make_session(full_rank().model, {.kv = GetParam()});
  for (const int64_t n : {1, 15, 16, 17, 64, 79, 80, 81, 96, 97, 113, 144, 200, 511, 512, 513, 640, 1100}) {
    session->reset();
    ASSERT_OK(session->prefill(part(0, n)));
    CacheStats stats = session->cache_stats();
    int64_t estimate = cache_bytes_estimate(*full_rank().model, kv(GetParam()), n);
    if (session->profile().kind == KvKind::klt && stats.bytes_pages > 0) {  // an upper bound
      EXPECT_LE(stats.bytes, estimate) << n;
      EXPECT_EQ(stats.bytes_hot, 0);
      ASSERT_OK(session->decode(tokens()[static_cast<size_t>(n)]));
      stats = session->cache_stats();
      estimate = cache_bytes_estimate(*full_rank().model, kv(GetParam()), n + 1);
      EXPECT_LE(stats.bytes, estimate) << n;
      EXPECT_GT(stats.bytes, estimate / 2) << n;
      EXPECT_EQ(stats.bytes_hot > 0, session->profile().budget != KvProfile::kBudgetAll || n < 600) << n;
      EXPECT_GE(stats.bytes, stats.bytes_pages + stats.bytes_hot);
    } else {
      EXPECT_EQ(stats.bytes, estimate) << n;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Profiles,
                         ::testing::ValuesIn(thinned<std::string>(
                             {"f16", "kivi-4", "kivi-2", "sals-25", "sals-12.5", "sals-25:budget=all",
                              "sals-12.5:budget=3", "sals-25:sinks=0,recent=1", "kivi-2:sinks=0,recent=1",
                              "kivi-4:sinks=33,recent=200", "klt", "klt-10x", "klt:budget=all",
                              "klt:budget=3,block=16,rank=8", "klt:sinks=0,recent=1"})),
                         profile_name);

TEST(Quality, FollowsTheBits) {
  const double kivi4 = distance(full_rank(), "kivi-4", 1000), kivi2 = distance(full_rank(), "kivi-2", 1000);
  const double sals25 = distance(full_rank(), "sals-25", 1000),
               all = distance(full_rank(), "sals-25:budget=all", 1000);
  const double few = distance(full_rank(), "sals-25:budget=20", 1000);
  EXPECT_LT(distance(full_rank(), "f16", 1000), 1e-12);
  EXPECT_LT(kivi4, 0.06);
  EXPECT_GT(kivi2, 4 * kivi4);
  EXPECT_LT(kivi2, 1.5);
  EXPECT_GT(all, 1e-3);  // it does compress
  EXPECT_LT(all, sals25);
  EXPECT_LT(sals25, 0.14);
  EXPECT_LT(sals25, few);
}

TEST(Quality, TheThresholdInAStepChangesLittle) {
  // From 400 on, the steps cross 512: the same layer before and after it has made its basis.
  EXPECT_LT(distance(low_rank(), "sals-25:budget=all", 400), 1e-3);
  EXPECT_LT(distance(full_rank(), "sals-25", 400), 0.06);
}

// Keys of rank D/4 lie in the basis: only the values' four bits are lost.
TEST(Quality, KeysOfLowRankAreKept) {
  const double kept = distance(low_rank(), "sals-25:budget=all", 1000);
  EXPECT_LT(kept, 2e-3);
  EXPECT_GT(kept, 1e-6);  // the values
  EXPECT_GT(distance(full_rank(), "sals-25:budget=all", 1000), 15 * kept);
  EXPECT_GT(distance(low_rank(), "sals-12.5:budget=all", 1000), 15 * kept);  // rank 4 of 8, values of 2 bits
}

TEST(Quality, KeysOfLowRankAreRebuilt) {
  const int64_t n = 900, width = 32, layer = 2;
  for (const bool fits : {true, false}) {
    const LoadedTiny& tiny = fits ? low_rank() : full_rank();
    auto exact = make_session(tiny.model), session = make_session(tiny.model, {.kv = "sals-25"});
    ASSERT_OK(Session::prefill_together(std::vector<Session*>{exact.get(), session.get()}, part(0, n)));
    std::vector<float> k(static_cast<size_t>(n * width)), v(k.size()), want(k.size()), want_v(k.size());
    Access::impl(*session).cache->layer(layer).read(0, n, k.data(), v.data());
    Access::impl(*exact).cache->layer(layer).read(0, n, want.data(), want_v.data());
    double error = 0, norm = 0, error_v = 0, norm_v = 0;
    for (size_t i = 0; i < k.size(); ++i) {
      error += std::pow(static_cast<double>(k[i]) - static_cast<double>(want[i]), 2);
      norm += std::pow(static_cast<double>(want[i]), 2);
      error_v += std::pow(static_cast<double>(v[i]) - static_cast<double>(want_v[i]), 2);
      norm_v += std::pow(static_cast<double>(want_v[i]), 2);
    }
    if (fits) {
      EXPECT_LT(std::sqrt(error / norm), 1e-3);  // f16 latents and keys
    } else {
      EXPECT_GT(std::sqrt(error / norm), 0.3);
    }
    // 4 bits over groups of 32: a step of a 15th of the range, 4 deviations wide.
    EXPECT_LT(std::sqrt(error_v / norm_v), 0.15);
    EXPECT_GT(std::sqrt(error_v / norm_v), 0.01);
  }
}

}  // namespace
}  // namespace narrows::testing
