// Anchors of klt pages: which queries are sampled, which tokens are found, and that these stay exact however
// the tokens came.
#include "kv/klt/klt_anchor.h"

#include <bit>
#include <cmath>
#include <set>

#include "kv/cache_data.h"

namespace narrows::test {
namespace {

KltLayer& klt_layer(KvCache& cache) { return static_cast<KltLayer&>(cache.layer(kCompressed)); }

// --- samples

TEST(QuerySamples, AreThoseAtMultiplesOfTheStrideFromTheSinksOn) {
  const Heads s(2, 1, 4);
  std::vector<float> q(static_cast<size_t>(200 * 8));
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i / 8);  // exact in half precision
  for (const int64_t piece : {1, 7, 200}) {
    QuerySamples samples(s.shape, 5);
    for (int64_t t = 0; t < 200; t += piece) samples.add(q.data() + t * 8, std::min(piece, 200 - t));
    for (int64_t t = 0; t < 220; ++t) {
      const auto* at = samples.at(t);
      ASSERT_EQ(at != nullptr, t >= 5 && t < 200 && (t - 5) % kQueryStride == 0) << t;
      if (at != nullptr) {
        EXPECT_EQ(kernels::half_to_float(at[7]), static_cast<float>(t));
      }
    }
    EXPECT_EQ(samples.bytes(), 13 * 8 * 2);
    samples.drop_before(37);  // not that at 37
    EXPECT_EQ(samples.at(21), nullptr);
    ASSERT_NE(samples.at(37), nullptr);
    EXPECT_EQ(kernels::half_to_float(samples.at(37)[0]), 37.0F);
    EXPECT_EQ(samples.bytes(), 11 * 8 * 2);
    // Tokens 100 .. come again, with other queries.
    samples.drop_from(100);
    EXPECT_EQ(samples.at(101), nullptr);
    ASSERT_NE(samples.at(85), nullptr);
    const std::vector<float> other(16, -2.0F);
    samples.add(other.data(), 1);
    EXPECT_EQ(samples.at(101), nullptr);
    samples.add(other.data(), 2);
    ASSERT_NE(samples.at(101), nullptr);
    EXPECT_EQ(kernels::half_to_float(samples.at(101)[3]), -2.0F);
    samples.drop_from(0);
    EXPECT_EQ(samples.bytes(), 0);
    samples.add(q.data(), 10);
    EXPECT_NE(samples.at(5), nullptr);
  }
}

// --- search

struct Scene {
  Heads s{6, 3, 20, 12};
  int64_t n_sink = 5, pos = 69;
  Tokens tokens{s, 69 + 128};
  std::vector<std::vector<float>> q;
  QuerySamples samples{s.shape, 5};

  Scene() {
    for (int64_t t = 0; t < tokens.n(); ++t) {
      q.push_back(random_query(s, static_cast<uint32_t>(t)));
      samples.add(q.back().data(), 1);
    }
  }
  /// Rotated keys of tokens [first, first + n).
  std::vector<float> rotated(int64_t first, int64_t n) const {
    std::vector<float> out;
    for (int64_t t = first; t < first + n; ++t) {
      for (const double x : tokens.rotated_key(s, t)) out.push_back(static_cast<float>(x));
    }
    return out;
  }
  uint64_t find(int64_t n_after, int64_t most) const {
    const auto sinks = rotated(0, n_sink), page = rotated(pos, kPageTokens + n_after);
    return find_anchors(s.shape, s.rope, samples, {sinks.data(), n_sink, page.data(), n_after, pos}, most);
  }
  /// Mean probability of each token of the page, by its definition.
  std::vector<double> shares(int64_t n_after) const {
    std::vector<double> share(kPageTokens);
    int64_t n = 0;
    for (int64_t t = pos + kPageTokens; t < pos + kPageTokens + n_after; ++t) {
      if ((t - n_sink) % kQueryStride != 0) continue;
      ++n;
      for (int64_t h = 0; h < 6; ++h) {
        std::vector<double> query(q[static_cast<size_t>(t)].begin() + h * 20,
                                  q[static_cast<size_t>(t)].begin() + (h + 1) * 20);
        s.rotate(query.data(), t);
        double sum = 0;
        std::vector<double> p(kPageTokens);
        for (int64_t j = 0; j <= t; ++j) {
          if (j >= n_sink && j < pos) continue;  // not looked at
          const auto key = tokens.rotated_key(s, j);
          double dot = 0;
          for (int64_t c = 0; c < 20; ++c)
            dot += query[static_cast<size_t>(c)] * key[static_cast<size_t>(h / 2 * 20 + c)];
          const double e = std::exp(dot / std::sqrt(20.0));
          sum += e;
          if (j >= pos && j < pos + kPageTokens) p[static_cast<size_t>(j - pos)] = e;
        }
        for (size_t j = 0; j < p.size(); ++j) share[j] += p[j] / sum;
      }
    }
    for (double& x : share) x /= static_cast<double>(n * 6);
    return share;
  }
};

TEST(Anchors, AreTheTokensOfTheLargestShares) {
  Scene scene;
  // Three keys that every query likes, one more than another.
  for (const auto& [token, gain] : {std::pair{20, 6.0F}, {3, 4.0F}, {63, 5.0F}}) {
    for (size_t c = 0; c < 60; ++c) {
      scene.tokens.k[static_cast<size_t>(scene.pos + token) * 60 + c] = c % 20 >= 12 ? gain : 0;
    }
  }
  for (auto& q : scene.q) {
    for (size_t c = 0; c < q.size(); ++c)
      q[c] = c % 20 >= 12 ? 0.6F : 0.3F * q[c];  // the part that is not rotated
  }
  scene.samples.drop_from(0);
  for (const auto& q : scene.q) scene.samples.add(q.data(), 1);
  for (const int64_t n_after : {1, 17, 63}) {
    const auto shares = scene.shares(n_after);
    constexpr auto kShare = static_cast<double>(kAnchorShare);
    uint64_t want = 0;
    for (size_t t = 0; t < shares.size(); ++t) {
      ASSERT_GT(std::fabs(shares[t] - kShare), 1e-3) << "too near the threshold to tell";
      if (shares[t] >= kShare) want |= uint64_t{1} << t;
    }
    EXPECT_NE(want >> 20 & 1, 0U);
    EXPECT_EQ(scene.find(n_after, 64), want) << n_after;
    EXPECT_EQ(scene.find(n_after, 1), uint64_t{1} << 20) << "the strongest";
    EXPECT_EQ(scene.find(n_after, 0), 0U);
  }
  EXPECT_EQ(scene.find(0, 64), 0U) << "nobody judges";
}

// --- layers

/// Tokens of which some draw most of the attention, and the queries that do it.
struct Drawn {
  Heads s{6, 3, 32, 16};
  Tokens tokens{s, 700};
  std::vector<float> q;  ///< [700, 6, 32]
  std::set<int64_t> strong = {3, 40, 100, 101, 300, 301, 302, 520, 690};

  Drawn() {
    for (int64_t t = 0; t < 700; ++t) {
      auto row = random_query(s, static_cast<uint32_t>(t));
      for (size_t c = 0; c < row.size(); ++c) row[c] = c % 32 >= 16 ? 1.0F : 0.2F * row[c];
      q.insert(q.end(), row.begin(), row.end());
    }
    for (int64_t t = 0; t < 700; ++t) {
      for (size_t c = 0; c < 96; ++c) {
        float& x = tokens.k[static_cast<size_t>(t) * 96 + c];
        if (c % 32 >= 16) x = (strong.count(t) > 0 ? 3.0F : 0.0F) + 0.1F * x;
      }
    }
  }
  const float* queries(int64_t t) const { return q.data() + t * 6 * 32; }
};

std::set<int64_t> anchors_of(const KltLayer& layer) {
  std::set<int64_t> found;
  for (int64_t p = 0; p < layer.n_page(); ++p) {
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if ((layer.anchors(p) >> t & 1) != 0) found.insert(layer.n_sink() + p * kPageTokens + t);
    }
  }
  return found;
}

/// Grows a layer in pieces, by prompts and steps in turn.
void grow(KltLayer& layer, const Drawn& d, int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  for (int64_t t = 0; t < n;) {
    const int64_t m = seed == 0 ? n : std::min<int64_t>(n - t, 1 + static_cast<int64_t>(random() % 150));
    if (seed == 0 || random() % 2 == 0) {
      layer.observe_queries(d.queries(t), m);
      ASSERT_TRUE(layer.append(d.tokens.key(t), d.tokens.value(t), m).ok());
    } else {
      for (int64_t i = t; i < t + m; ++i) {
        step_tokens(layer, d.tokens, i, i + 1);
        layer.observe_queries(d.queries(i), 1);
      }
    }
    t += m;
  }
}

std::unique_ptr<KvCache> with_basis(const Drawn& d, const std::string& profile) {
  auto cache = make_cache(d.s, profile);
  EXPECT_TRUE(klt_layer(*cache)
                  .use_basis(klt_basis_of(d.s, d.tokens.k.data(), d.tokens.v.data(), d.tokens.n()))
                  .ok());
  return cache;
}

TEST(KltAnchors, StayExactHoweverTokensCome) {
  const Drawn d;
  const auto plain = with_basis(d, "klt:anchors=0");
  grow(klt_layer(*plain), d, 700, 0);
  for (uint32_t seed = 0; seed < 6; ++seed) {
    const auto cache = with_basis(d, "klt:anchors=4");
    KltLayer& layer = klt_layer(*cache);
    grow(layer, d, 700, seed);
    ASSERT_TRUE(layer.make_room(true).ok());
    // 3 is a sink, 690 is in the window.
    EXPECT_EQ(anchors_of(layer), (std::set<int64_t>{40, 100, 101, 300, 301, 302, 520})) << seed;
    EXPECT_EQ(layer.n_kept(), 7);
    EXPECT_EQ(layer.sinks().size(), 16 + 7);
    EXPECT_EQ(layer.n_tokens(), 700);
    const Decoded all(layer), without(klt_layer(*plain));
    for (const int64_t t : anchors_of(layer)) {
      const auto key = d.tokens.rotated_key(d.s, t);
      double worst = 0;
      for (size_t c = 0; c < 96; ++c) {
        const size_t at = static_cast<size_t>(t) * 96 + c;
        EXPECT_NEAR(all.k[at], key[c], 2e-3 * (1 + std::fabs(key[c]))) << t;
        EXPECT_NEAR(all.v[at], d.tokens.v[at], 2e-3 * (1 + std::fabs(d.tokens.v[at]))) << t;
        worst = std::max(worst, std::fabs(static_cast<double>(without.v[at] - d.tokens.v[at])));
      }
      EXPECT_GT(worst, 0.05) << "without anchors its values have an error to speak of";
    }
    // Any range, from within a page on.
    const Decoded some(layer, 101, 201);
    for (size_t i = 0; i < some.k.size(); ++i) ASSERT_EQ(some.k[i], all.k[101 * 96 + i]);
    layer.clear();
    EXPECT_EQ(layer.n_tokens(), 0);
    EXPECT_EQ(layer.bytes().total(), layer.bytes().basis);
    grow(layer, d, 300, seed);
    EXPECT_EQ(anchors_of(layer), (std::set<int64_t>{40, 100, 101})) << "after clear() all begins anew";
  }
}

TEST(KltAnchors, AreFewAndCounted) {
  const Drawn d;
  const auto cache = with_basis(d, "klt"), none = with_basis(d, "klt:anchors=0");
  grow(klt_layer(*cache), d, 700, 0);
  grow(klt_layer(*none), d, 700, 0);
  const KltLayer& layer = klt_layer(*cache);
  // One a page on average at most: the second and third page have two of the first three.
  std::set<int64_t> found = anchors_of(layer);
  EXPECT_LE(layer.n_kept(), layer.n_page());
  EXPECT_TRUE(found.count(40) == 1 && found.count(520) == 1);
  EXPECT_EQ(found.count(100) + found.count(101), 1U);
  const LayerBytes bytes = layer.bytes(), less = klt_layer(*none).bytes();
  EXPECT_EQ(bytes.pages, less.pages + 16 * 96 * 2 * 2) << "one block of exact tokens";
  EXPECT_EQ(bytes.exact, less.exact);
  EXPECT_TRUE(anchors_of(klt_layer(*none)).empty());
}

TEST(KltAnchors, NeedQueries) {
  const Drawn d;
  const auto blind = with_basis(d, "klt"), narrow = with_basis(d, "klt:recent=1"),
             late = make_cache(d.s, "klt");
  ASSERT_TRUE(klt_layer(*blind).append(d.tokens.key(0), d.tokens.value(0), 700).ok());
  grow(klt_layer(*narrow), d, 700, 0);
  EXPECT_TRUE(anchors_of(klt_layer(*blind)).empty());
  EXPECT_TRUE(anchors_of(klt_layer(*narrow)).empty()) << "nothing follows a page when it is made";
  // A layer that makes its own transforms has waited with its pages, and with the samples.
  grow(klt_layer(*late), d, 700, 3);
  EXPECT_EQ(anchors_of(klt_layer(*late)), anchors_of([&]() -> KltLayer& {
              static auto cache = make_cache(d.s, "klt");
              grow(klt_layer(*cache), d, 700, 0);
              return klt_layer(*cache);
            }()));
}

TEST(KltAnchors, ARefusedPromptLeavesNothingBehind) {
  Drawn d;
  const auto cache = with_basis(d, "klt:anchors=4"), fresh = with_basis(d, "klt:anchors=4");
  KltLayer& layer = klt_layer(*cache);
  grow(layer, d, 300, 0);
  const auto before = anchors_of(layer);
  const LayerBytes bytes = layer.bytes();
  Tokens broken = d.tokens;
  broken.v[650 * 96] = std::numeric_limits<float>::quiet_NaN();
  layer.observe_queries(d.queries(0), 400);  // of other tokens
  EXPECT_EQ(layer.append(broken.key(300), broken.value(300), 400).code(), StatusCode::non_finite);
  EXPECT_EQ(anchors_of(layer), before);
  EXPECT_EQ(layer.bytes().total(), bytes.total());
  layer.observe_queries(d.queries(300), 400);
  ASSERT_TRUE(layer.append(d.tokens.key(300), d.tokens.value(300), 400).ok());
  grow(klt_layer(*fresh), d, 700, 0);
  EXPECT_EQ(anchors_of(layer), anchors_of(klt_layer(*fresh)));
}

}  // namespace
}  // namespace narrows::test
