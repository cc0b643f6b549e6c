// The ring of a window: what it holds, what it lets go, and its attention against double over the window
// alone.
#include "kv/profiles.h"
#include "kv/step/step_runner.h"
#include "kv/window/ring_layer.h"

namespace narrows::test {
namespace {

struct Case {
  int64_t window, n_head, n_head_kv, head_dim;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "window " << c.window << " heads " << c.n_head << "/" << c.n_head_kv << " of " << c.head_dim;
}

class Ring : public testing::TestWithParam<Case> {
 protected:
  const Heads heads_{GetParam().n_head, GetParam().n_head_kv, GetParam().head_dim};
  const int64_t window_ = GetParam().window;
  const Tokens tokens_{heads_, 1700};

  RingLayer fresh() const { return {heads_.shape, &heads_.rope, window_}; }
  RingLayer filled(int64_t n) const {
    RingLayer layer = fresh();
    EXPECT_TRUE(layer.append(tokens_.key(0), tokens_.value(0), n).ok());
    return layer;
  }
  void add(KvLayer& layer, int64_t to) const {
    const int64_t n = layer.n_tokens();
    EXPECT_TRUE(layer.append(tokens_.key(n), tokens_.value(n), to - n).ok());
  }
  std::vector<int64_t> seen_at(int64_t t) const {
    std::vector<int64_t> seen;
    for (int64_t i = std::max<int64_t>(0, t + 1 - window_); i <= t; ++i) seen.push_back(i);
    return seen;
  }
  /// What a query behind n tokens sees of them.
  Decoded seen_of(const KvLayer& layer) const {
    const int64_t n = layer.n_tokens(), from = std::max<int64_t>(0, n + 1 - window_);
    return {layer, from, n - from};
  }
  static bool same(const Decoded& a, const Decoded& b) { return a.k == b.k && a.v == b.v; }
};

TEST_P(Ring, AStepSeesTheWindowAlone) {
  for (const int n_threads : {1, 3}) {
    RingLayer layer = filled(40);
    StepScratch scratch(heads_.shape, n_threads);
    for (int64_t t = 40; t < 1300; ++t) {
      const auto q = random_query(heads_, static_cast<uint32_t>(t));
      const auto got = run_step(layer, scratch, tokens_, t, q);
      if (t > 120 && t % 64 > 1 && t % 64 < 62) continue;  // around the ends of blocks
      const auto want = attention(heads_, q, t, Decoded(layer), seen_at(t));
      for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 2e-5) << t;
    }
    EXPECT_LE(layer.bytes().exact, RingLayer::bytes_for(heads_.shape, window_, 1300, false));
  }
}

// Memory is that of the window, however long the text; and pieces make what one prompt makes.
TEST_P(Ring, HoldsAWindowOfAnyPrompt) {
  for (const int64_t n : {1, 63, 64, 65, 500, 640, 641, 900, 1299, 1300, 1700}) {
    RingLayer pieces = fresh();
    for (int64_t to = std::min<int64_t>(n, 7); pieces.n_tokens() < n; to = std::min(n, to * 3 + 1))
      add(pieces, to);
    const RingLayer whole = filled(n);
    ASSERT_EQ(pieces.n_tokens(), n);
    ASSERT_TRUE(same(seen_of(pieces), seen_of(whole))) << n;
    ASSERT_EQ(whole.bytes().exact, RingLayer::bytes_for(heads_.shape, window_, n, false)) << n;
    const Decoded seen = seen_of(whole);
    const int64_t from = n - static_cast<int64_t>(seen.k.size()) / heads_.width();
    for (int64_t t = from; t < n; ++t) {
      const auto key = tokens_.rotated_key(heads_, t);
      for (int64_t c = 0; c < heads_.width(); ++c) {
        const auto at = static_cast<size_t>((t - from) * heads_.width() + c);
        ASSERT_NEAR(seen.k[at], key[static_cast<size_t>(c)],
                    0x1p-10 * std::fabs(key[static_cast<size_t>(c)]) + 1e-5);
        ASSERT_NEAR(seen.v[at], tokens_.value(t)[c], 0x1p-10 * std::fabs(tokens_.value(t)[c]) + 1e-5);
      }
    }
  }
}

TEST_P(Ring, GoesBackWhereItHoldsTheWindowOrHasAMark) {
  RingLayer layer = fresh();
  std::vector<int64_t> ends;
  for (int64_t end = 272; end <= 1552; end += 256) {
    add(layer, end);
    int64_t changed = 0;
    ASSERT_TRUE(layer.seal(&changed).ok());
    EXPECT_EQ(changed, end) << "nothing that is exact changes";
    ends.push_back(end);
  }
  add(layer, 1700);
  for (const int64_t n : {int64_t{1552}, int64_t{1700}, int64_t{1450}}) ASSERT_TRUE(layer.can_keep(n)) << n;
  EXPECT_EQ(layer.can_keep(300), RingLayer::first_held(1700, window_) <= std::max<int64_t>(0, 301 - window_));
  EXPECT_FALSE(layer.can_keep(1701));
  EXPECT_FALSE(layer.can_keep(-1));

  RingLayer shared = fresh();
  ASSERT_TRUE(shared.share(layer, 1552).ok());
  layer.keep(1552);
  const RingLayer want = filled(1552);
  for (RingLayer* l : {&layer, &shared}) {
    EXPECT_EQ(l->n_tokens(), 1552);
    EXPECT_TRUE(same(seen_of(*l), seen_of(want)));
  }
  // Either goes on alone.
  add(layer, 1700);
  EXPECT_TRUE(same(seen_of(shared), seen_of(want)));
  EXPECT_TRUE(same(seen_of(layer), seen_of(filled(1700))));
  layer.keep(0);
  EXPECT_EQ(layer.n_tokens(), 0);
  EXPECT_EQ(layer.bytes().exact, 0);
}

// A mark outlives what steps let go.
TEST_P(Ring, AMarkStays) {
  RingLayer layer = filled(272);
  int64_t changed = 0;
  ASSERT_TRUE(layer.seal(&changed).ok());
  StepScratch scratch(heads_.shape, 1);
  for (int64_t t = 272; t < 1700; ++t) run_step(layer, scratch, tokens_, t, random_query(heads_, 1));
  ASSERT_TRUE(layer.can_keep(272));
  RingLayer shared = fresh();
  ASSERT_TRUE(shared.share(layer, 272).ok());
  layer.keep(272);
  EXPECT_TRUE(same(seen_of(layer), seen_of(filled(272))));
  EXPECT_TRUE(same(seen_of(shared), seen_of(filled(272))));
}

TEST_P(Ring, IsSavedWithItsMarks) {
  RingLayer layer = filled(272);
  int64_t changed = 0;
  ASSERT_TRUE(layer.seal(&changed).ok());
  add(layer, 1500);
  std::string bytes;
  {
    std::FILE* file = std::tmpfile();
    SnapshotWriter out(file);
    layer.save(out);
    bytes.resize(static_cast<size_t>(std::ftell(file)));
    std::rewind(file);
    ASSERT_EQ(std::fread(bytes.data(), 1, bytes.size(), file), bytes.size());
    (void)std::fclose(file);
  }
  RingLayer loaded = fresh();
  SnapshotReader in(bytes);
  ASSERT_TRUE(loaded.load(in).ok());
  EXPECT_EQ(in.left(), 0U);
  EXPECT_EQ(loaded.n_tokens(), 1500);
  EXPECT_TRUE(same(seen_of(loaded), seen_of(layer)));
  EXPECT_TRUE(loaded.can_keep(272));
  loaded.keep(272);
  EXPECT_TRUE(same(seen_of(loaded), seen_of(filled(272))));
  // Cut off anywhere it is refused and empty.
  for (size_t n = 0; n < bytes.size(); n += n < 64 ? 1 : bytes.size() / 40) {
    SnapshotReader cut(std::string_view(bytes).substr(0, n));
    RingLayer broken = fresh();
    EXPECT_FALSE(broken.load(cut).ok()) << n;
    EXPECT_EQ(broken.n_tokens(), 0);
  }
}

TEST_P(Ring, RefusesWhatIsNoNumber) {
  RingLayer layer = filled(100);
  std::vector<float> bad(tokens_.key(100), tokens_.key(100) + 3 * heads_.width());
  bad[static_cast<size_t>(heads_.width())] = std::numeric_limits<float>::quiet_NaN();
  const Status s = layer.append(bad.data(), tokens_.value(100), 3);
  EXPECT_EQ(s.code(), StatusCode::non_finite);
  EXPECT_EQ(layer.n_tokens(), 100);
  EXPECT_TRUE(same(seen_of(layer), seen_of(filled(100))));
}

INSTANTIATE_TEST_SUITE_P(Windows, Ring,
                         testing::Values(Case{1, 2, 1, 16}, Case{24, 6, 3, 16}, Case{100, 4, 2, 20},
                                         Case{512, 2, 2, 32}, Case{5000, 3, 1, 12}));

// Layers with a window and without stand side by side in a cache of any profile.
TEST(Windows, AreKeptExactInEveryProfile) {
  const Heads s(4, 2, 32);
  const Tokens tokens(s, 1500);
  std::vector<KvLayerSpec> layers = layers_of(s, 4);
  layers[0].window = layers[2].window = 40;
  for (const std::string& name : KvProfile::names()) {
    const KvProfile profile = profile_of(name);
    auto cache = KvCache::create(layers, profile, nullptr, value_weights(s));
    ASSERT_TRUE(cache.ok());
    for (int64_t l = 0; l < 4; ++l)
      ASSERT_TRUE((*cache)->layer(l).append(tokens.key(0), tokens.value(0), 1500).ok()) << name;
    const CacheStats stats = (*cache)->stats();
    const int64_t ring = RingLayer::bytes_for(s.shape, 40, 1500, false);
    EXPECT_EQ((*cache)->layer(0).bytes().exact, ring);
    EXPECT_EQ((*cache)->layer(2).bytes().total(), ring);
    EXPECT_LE(stats.bytes, kv_bytes_estimate(layers, profile, 1500)) << name;
    const int64_t compressed = name == "f16"              ? 0
                               : name.starts_with("sals") ? 0
                                                          : 2;  // SALS: 0, 1 and the last are dense
    EXPECT_EQ(stats.n_layer_compressed, compressed) << name;
  }
}

}  // namespace
}  // namespace narrows::test
