// A decode step of every kind of layer against softmax attention in double over what read() returns.
#include "kv/step/step_runner.h"
#include "support/sanitized.h"

namespace narrows::test {
namespace {

struct Case {
  const char* profile;
  int64_t n_head, n_head_kv, head_dim, n_rot;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.profile << " heads " << c.n_head << "/" << c.n_head_kv << " of " << c.head_dim << " rot "
             << c.n_rot;
}

class Decode : public testing::TestWithParam<Case> {};

/// Largest difference to the reference, which has this size itself.
double error_of(const std::vector<float>& out, const std::vector<double>& ref) {
  double worst = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    if (!std::isfinite(out[i])) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, std::fabs(static_cast<double>(out[i]) - ref[i]));
  }
  return worst;
}

// float32 attention over values of size 1 to 4; measured 1e-6.
constexpr double kTolerance = 2e-5;

TEST_P(Decode, EveryLengthMatchesReference) {
  const Case c = GetParam();
  const Heads s(c.n_head, c.n_head_kv, c.head_dim, c.n_rot);
  const KvProfile profile = profile_of(c.profile);
  const int64_t n = 1100;
  const Tokens tokens(s, n);
  for (const int n_threads : {1, 3}) {
    if (kSanitized && n_threads == 1) continue;
    const auto cache = make_cache(s, c.profile);
    KvLayer& layer = cache->layer(kCompressed);
    StepScratch scratch(s.shape, n_threads);
    for (int64_t t = 0; t < n; ++t) {
      const auto q = random_query(s, static_cast<uint32_t>(t));
      const auto out = run_step(layer, scratch, tokens, t, q);
      // Every length around pages, windows and the conversion of SALS and klt; every 16th elsewhere, to save
      // time.
      const auto converts = [t](int64_t at) { return t >= at - 7 && t < at + 18; };
      if (kSanitized && t % 16 > 1) continue;  // the oracle is what takes the time
      if (t > 300 && t % 16 > 1 && !converts(512) && !converts(tokens_for_klt(s.width()))) continue;
      ASSERT_LT(error_of(out, attention_of_step(s, q, t, layer)), kTolerance)
          << "token " << t << " threads " << n_threads;
    }
    ASSERT_EQ(layer.n_tokens(), n);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Decode,
    testing::Values(Case{"f16", 9, 3, 64, 0}, Case{"f16", 4, 4, 48, 0}, Case{"f16", 7, 1, 80, 64},
                    Case{"sals-25", 9, 3, 64, 0}, Case{"sals-12.5", 6, 2, 32, 0},
                    Case{"sals-25:budget=100", 4, 4, 48, 0}, Case{"sals-12.5:budget=37", 14, 2, 80, 40},
                    Case{"sals-25:budget=all", 3, 1, 64, 0},
                    Case{"sals-25:sinks=0,recent=1,budget=40", 4, 2, 32, 0},
                    Case{"kivi-4:sinks=0,recent=1", 4, 2, 32, 0}, Case{"kivi-4", 9, 3, 64, 0},
                    Case{"kivi-2", 4, 4, 48, 0}, Case{"kivi-2", 7, 1, 80, 0}, Case{"klt", 9, 3, 64, 0},
                    Case{"klt-10x:budget=100", 4, 4, 48, 0}, Case{"klt:budget=37,block=16", 14, 2, 80, 40},
                    Case{"klt:budget=all", 3, 1, 64, 0}, Case{"klt:budget=50,rank=8", 6, 3, 20, 0},
                    Case{"klt:sinks=0,recent=1,budget=40,block=32", 4, 2, 32, 0},
                    Case{"klt:k=8,v=8,budget=60", 4, 2, 128, 0}));

class Sinks : public testing::TestWithParam<const char*> {};

// A head's softmax has a summand that belongs to no token: none worth speaking of, some, nearly all there is.
TEST_P(Sinks, AreOneSummandMore) {
  const Heads s(6, 2, 32, 0);
  const std::vector<float> sinks = {-50, -1, 0.5F, 2, 6, 40};
  const int64_t n = 900;
  const Tokens tokens(s, n);
  const auto cache = make_cache(s, GetParam());
  KvLayer& layer = cache->layer(kCompressed);
  StepScratch scratch(s.shape, 2);
  for (int64_t t = 0; t < n; ++t) {
    const auto q = random_query(s, static_cast<uint32_t>(t));
    const auto out = run_step(layer, scratch, tokens, t, q, Run::in_turn, sinks.data());
    if (t > 3 && t % 50 > 1) continue;
    ASSERT_LT(error_of(out, attention_of_step(s, q, t, layer, sinks)), kTolerance) << "token " << t;
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Sinks,
                         testing::Values("f16", "kivi-4", "sals-25:budget=100", "klt:budget=100",
                                         "klt:budget=all"));

class Anchored : public testing::TestWithParam<const char*> {};

// A few tokens that every query likes: they become anchors, are read once a step, exactly, and never as part
// of a page. Both the error that reading one twice makes and the one of leaving it out are far above the
// tolerance.
TEST_P(Anchored, TokensAreReadOnce) {
  const Heads s(6, 3, 32, 20);  // channels 20.. of a head are not rotated
  const KvProfile profile = profile_of(GetParam());
  constexpr int64_t n = 900;
  Tokens tokens(s, n);
  const std::vector<int64_t> liked = {30, 100, 101, 300, 511, 640};
  for (const int64_t t : liked) {
    for (int64_t c = 0; c < s.width(); ++c)
      tokens.k[static_cast<size_t>(t * s.width() + c)] = c % 32 >= 20 ? 4.0F : 0.0F;
  }
  const auto cache = make_cache(s, GetParam());
  auto& layer = dynamic_cast<KltLayer&>(cache->layer(kCompressed));
  StepScratch scratch(s.shape, 2);
  for (int64_t t = 0; t < n; ++t) {
    auto q = random_query(s, static_cast<uint32_t>(t));
    for (size_t c = 0; c < q.size(); ++c) q[c] = c % 32 >= 20 ? 0.6F : 0.3F * q[c];
    const auto out = run_step(layer, scratch, tokens, t, q);
    if (t < 600 || t % 16 > 1) continue;
    for (int64_t g = 0; g < s.shape.n_head_kv; ++g) {
      const auto chosen = layer.last_selection(g);
      if (!chosen) continue;
      for (const int64_t anchor : liked) {
        EXPECT_FALSE(std::binary_search(chosen->begin(), chosen->end(), static_cast<int32_t>(anchor)))
            << anchor << " at token " << t;
      }
    }
    ASSERT_LT(error_of(out, attention_of_step(s, q, t, layer)), kTolerance) << "token " << t;
  }
  ASSERT_EQ(layer.n_kept(), static_cast<int64_t>(liked.size()));
  for (const int64_t t : liked) {
    const int64_t i = t - profile.n_sink;
    EXPECT_NE(layer.anchors(i / kPageTokens) >> i % kPageTokens & 1, 0U) << t;
  }
}

INSTANTIATE_TEST_SUITE_P(Ways, Anchored,
                         testing::Values("klt:anchors=2",                    // by mass
                                         "klt:anchors=2,budget=50,mass=1",   // sparse
                                         "klt:anchors=2,budget=760,mass=1",  // nearly all, then sparse
                                         "klt:anchors=2,budget=830,mass=1",  // all, out of hot keys
                                         "klt:anchors=2,budget=all"));       // streamed

}  // namespace
}  // namespace narrows::test
