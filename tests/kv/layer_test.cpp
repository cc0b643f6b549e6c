// What every kind of layer promises: where tokens live at each length, bytes, refusal without effect,
// clear().
#include "kv/cache_data.h"
#include "support/sanitized.h"

namespace narrows::test {
namespace {

struct Case {
  const char* profile;
  int64_t n_head_kv, head_dim;
  bool with_basis;  ///< sals, klt: from a file's contents, so that short lengths are encoded too
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.profile << " " << c.n_head_kv << "x" << c.head_dim << (c.with_basis ? " basis" : "");
}

std::shared_ptr<const BasisFile> basis_from(const Tokens& tokens) {
  auto file = std::make_shared<BasisFile>();
  KeyMoments moments(tokens.width);
  moments.add(tokens.k.data(), tokens.n());
  for (int64_t i = 0; i < kLayers; ++i) file->layers.push_back(moments.leading(tokens.width).value());
  return file;
}

class Layer : public testing::TestWithParam<Case> {
 protected:
  Heads heads_{GetParam().n_head_kv, GetParam().n_head_kv, GetParam().head_dim};
  KvProfile profile_ = profile_of(GetParam().profile);
  Tokens tokens_{heads_, 960};
  std::shared_ptr<const BasisFile> basis_ = GetParam().with_basis ? basis_from(tokens_) : nullptr;

  std::unique_ptr<KvCache> cache() const {
    if (profile_.kind != KvKind::klt || !GetParam().with_basis)
      return make_cache(heads_, GetParam().profile, basis_);
    auto made = make_cache(heads_, GetParam().profile);
    const Status s = static_cast<KltLayer&>(made->layer(kCompressed))
                         .use_basis(klt_basis_of(heads_, tokens_.k.data(), tokens_.v.data(), tokens_.n()));
    EXPECT_TRUE(s.ok()) << s.message();
    return made;
  }
  int64_t unit() const { return profile_.kind == KvKind::klt ? 64 : profile_.kind == KvKind::kivi ? 32 : 16; }
  bool encodes(int64_t n) const {
    if (profile_.kind == KvKind::f16) return false;
    const int64_t width = heads_.width();
    const int64_t larger_exact =
        profile_.kind == KvKind::klt ? 256 + 5 * std::min<int64_t>(width, 256) / 2 : 0;
    return profile_.kind == KvKind::kivi || basis_ || n >= std::max({int64_t{512}, 2 * width, larger_exact});
  }
  /// The rule, word by word: a unit leaves when all its tokens are older than the last n_recent.
  int64_t in_pages(int64_t n) const {
    int64_t pages = 0;
    while (encodes(n) && profile_.n_sink + pages + unit() - 1 < n - profile_.n_recent) pages += unit();
    return pages;
  }
  void expect_contents(const KvLayer& layer, int64_t n, const std::string& note) const {
    ASSERT_EQ(layer.n_tokens(), n) << note;
    const int64_t pages = in_pages(n);
    ASSERT_EQ(layer.bytes().n_tokens_in_pages, pages) << note << " n " << n;
    const Decoded all(layer);
    const auto d = static_cast<size_t>(heads_.width());
    for (int64_t t = 0; t < n; ++t) {
      const bool exact = t < profile_.n_sink || t >= profile_.n_sink + pages;
      const auto key = tokens_.rotated_key(heads_, t);
      for (size_t i = 0; i < d; ++i) {
        const size_t at = static_cast<size_t>(t) * d + i;
        ASSERT_TRUE(std::isfinite(all.k[at]) && std::isfinite(all.v[at]))
            << note << " n " << n << " token " << t;
        if (!exact && profile_.kind != KvKind::f16) continue;
        // Half rounding of a float32 rotation, which may land on the other side of a tie.
        ASSERT_NEAR(all.k[at], key[i], (std::fabs(key[i]) + 0.1) * kHalfEps)
            << note << " n " << n << " token " << t;
        ASSERT_EQ(all.v[at], static_cast<float>(to_half(static_cast<double>(tokens_.v[at]))))
            << note << " token " << t;
      }
    }
  }
};

TEST_P(Layer, HoldsEveryLength) {
  const auto stepped = cache();
  for (int64_t n = 1; n <= 300; ++n) {
    step_tokens(stepped->layer(kCompressed), tokens_, n - 1, n);
    expect_contents(stepped->layer(kCompressed), n, "stepped");
    const auto fresh = cache();
    const Status s = fresh->layer(kCompressed).append(tokens_.key(0), tokens_.value(0), n);
    ASSERT_TRUE(s.ok()) << s.message();
    expect_contents(fresh->layer(kCompressed), n, "appended");
    ASSERT_EQ(stepped->layer(kCompressed).bytes().total(), fresh->layer(kCompressed).bytes().total()) << n;
  }
}

TEST_P(Layer, PiecesMakeTheSameCache) {
  // One code of klt is part of every channel of its token, so counting channels says nothing: KltLayer has
  // its own.
  if (profile_.kind == KvKind::klt) GTEST_SKIP();
  const auto whole = cache();
  ASSERT_TRUE(whole->layer(kCompressed).append(tokens_.key(0), tokens_.value(0), 700).ok());
  expect_contents(whole->layer(kCompressed), 700, "whole");
  // append() encodes for the tokens that are there, a step for one more: let all look at the second state.
  ASSERT_TRUE(whole->layer(kCompressed).make_room(true).ok());
  const Decoded want(whole->layer(kCompressed));
  std::mt19937 random(7);
  for (int round = 0; round < 12; ++round) {
    const auto pieces = cache();
    KvLayer& layer = pieces->layer(kCompressed);
    int64_t n = 0;
    while (n < 700) {
      const int64_t most = round % 3 == 0 ? 7 : round % 3 == 1 ? 40 : 400;
      const int64_t m = std::min<int64_t>(700 - n, 1 + static_cast<int64_t>(random()) % most);
      if (random() % 2 == 0) {
        ASSERT_TRUE(layer.append(tokens_.key(n), tokens_.value(n), m).ok());
      } else {
        step_tokens(layer, tokens_, n, n + m);
      }
      n += m;
      ASSERT_EQ(layer.n_tokens(), n);
    }
    ASSERT_TRUE(layer.make_room(true).ok());
    ASSERT_EQ(layer.bytes().total(), whole->layer(kCompressed).bytes().total()) << "round " << round;
    const Decoded got(layer);
    // Tokens that waited in the window were rounded to f16 first, so a number near the middle between two
    // codes (one in 2^11 at 2 bits, by the width of the rounding) may get the other one.
    int64_t n_different = 0;
    for (size_t i = 0; i < want.k.size(); ++i) {
      n_different += std::fabs(got.k[i] - want.k[i]) > 0.02 * (std::fabs(want.k[i]) + 1) ? 1 : 0;
      n_different += std::fabs(got.v[i] - want.v[i]) > 0.02 * (std::fabs(want.v[i]) + 1) ? 1 : 0;
    }
    ASSERT_LT(n_different, static_cast<int64_t>(want.k.size()) / 250) << "round " << round;
  }
}

TEST_P(Layer, RefusesNonFiniteWithoutEffect) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (const int64_t held : {0, 10, 90, 200, 900}) {
    const auto made = cache();
    KvLayer& layer = made->layer(kCompressed);
    if (held > 0) {
      ASSERT_TRUE(layer.append(tokens_.key(0), tokens_.value(0), held).ok());
    }
    const Decoded before(layer);
    const LayerBytes bytes = layer.bytes();
    for (const int64_t bad : {0, 20, 43, 59}) {
      for (const float x : {nan, inf, -inf, 65600.0F, -1e30F}) {
        for (const bool in_key : {true, false}) {
          Tokens broken = tokens_;
          float* row = (in_key ? broken.k.data() : broken.v.data()) + (held + bad) * broken.width;
          row[broken.width - 1] = x;
          const Status s = layer.append(broken.key(held), broken.value(held), 60);
          ASSERT_EQ(s.code(), StatusCode::non_finite) << held << " " << bad << " " << x;
          ASSERT_NE(s.message().find("token " + std::to_string(held + bad) + " "), std::string::npos)
              << s.message();
          ASSERT_EQ(layer.n_tokens(), held);
          ASSERT_EQ(layer.bytes().total(), bytes.total());
        }
      }
    }
    const Decoded after(layer);
    ASSERT_EQ(before.k, after.k);
    ASSERT_EQ(before.v, after.v);
    // And it still works.
    ASSERT_TRUE(layer.append(tokens_.key(held), tokens_.value(held), 60).ok());
    expect_contents(layer, held + 60, "after refusal");
  }
}

TEST_P(Layer, RefusesKeysThatOnlyRotationMakesTooLarge) {
  const auto made = cache();
  KvLayer& layer = made->layer(kCompressed);
  Tokens broken = tokens_;
  const int64_t half = heads_.shape.head_dim / 2;
  broken.k[static_cast<size_t>(3 * broken.width)] =
      60000.0F;  // token 3, angle 3: 60000 (cos 3 - sin 3) = -67867
  broken.k[static_cast<size_t>(3 * broken.width + half)] = 60000.0F;
  EXPECT_EQ(layer.append(broken.key(0), broken.value(0), 8).code(), StatusCode::non_finite);
  EXPECT_EQ(layer.n_tokens(), 0);
  broken.k[static_cast<size_t>(3 * broken.width + half)] = 0.0F;  // |60000| turned alone stays within
  EXPECT_TRUE(layer.append(broken.key(0), broken.value(0), 8).ok());
}

TEST_P(Layer, NonFiniteStepIsReportedByTheNext) {
  const auto made = cache();
  KvLayer& layer = made->layer(kCompressed);
  ASSERT_TRUE(layer.append(tokens_.key(0), tokens_.value(0), 100).ok());
  Tokens broken = tokens_;
  broken.v[static_cast<size_t>(100 * broken.width + 1)] = std::numeric_limits<float>::quiet_NaN();
  step_tokens(layer, broken, 100, 101);
  const Status s = layer.make_room(true);
  EXPECT_EQ(s.code(), StatusCode::non_finite);
  EXPECT_NE(s.message().find("token 100 "), std::string::npos) << s.message();
  layer.clear();
  step_tokens(layer, tokens_, 0, 5);
  expect_contents(layer, 5, "after clear");
}

TEST_P(Layer, ClearForgets) {
  const auto made = cache();
  KvLayer& layer = made->layer(kCompressed);
  // klt copies the transforms of a file, in half precision: they stay.
  const int64_t idle = layer.bytes().total();
  EXPECT_EQ(idle, layer.bytes().basis);
  ASSERT_TRUE(layer.append(tokens_.key(0), tokens_.value(0), 910).ok());
  EXPECT_GT(layer.bytes().total(), idle);
  layer.clear();
  EXPECT_EQ(layer.n_tokens(), 0);
  EXPECT_EQ(layer.bytes().total(), idle);
  ASSERT_TRUE(layer.append(tokens_.key(0), tokens_.value(0), 200).ok());
  expect_contents(layer, 200, "after clear");
}

TEST_P(Layer, ReadsAnyRange) {
  const auto made = cache();
  KvLayer& layer = made->layer(kCompressed);
  ASSERT_TRUE(layer.append(tokens_.key(0), tokens_.value(0), 900).ok());
  const Decoded all(layer);
  const auto d = static_cast<size_t>(heads_.width());
  for (const int64_t first : {0, 3, 15, 16, 17, 79, 80, 143, 500, 575, 576, 639, 835, 836, 899}) {
    for (const int64_t n : {1, 2, 63, 64, 65, 900}) {
      if (first + n > 900) continue;
      const Decoded part(layer, first, n);
      for (size_t i = 0; i < part.k.size(); ++i) {
        // Products of a tile of another width may sum in another order.
        ASSERT_NEAR(part.k[i], all.k[static_cast<size_t>(first) * d + i], 1e-4) << first << " " << n;
        ASSERT_EQ(part.v[i], all.v[static_cast<size_t>(first) * d + i]) << first << " " << n;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, Layer,
    testing::Values(Case{"f16", 3, 16, false}, Case{"sals-25", 3, 16, true}, Case{"sals-12.5", 2, 20, true},
                    Case{"sals-12.5:sinks=5,recent=40", 1, 48, true},
                    Case{"sals-25:sinks=0,recent=1", 3, 16, true},
                    Case{"kivi-4:sinks=0,recent=1", 3, 16, false}, Case{"klt", 3, 16, true},
                    Case{"klt-10x:sinks=0,recent=1", 2, 20, true},
                    Case{"klt:sinks=5,recent=40,k=8,v=0.25", 1, 48, true}, Case{"klt", 3, 16, false},
                    Case{"klt-10x", 5, 64, false}, Case{"sals-25", 3, 16, false},
                    Case{"kivi-4", 3, 16, false}, Case{"kivi-2", 1, 80, false}));

TEST(Cache, EstimateIsWhatStatsShow) {
  for (const int64_t head_dim : {20, 64}) {
    const Heads s(6, 3, head_dim);
    const Tokens tokens(s, 3000);
    const std::vector<float> queries(static_cast<size_t>(3000 * s.shape.n_head * head_dim), 0.5F);
    for (const char* profile : {"f16", "sals-25", "sals-12.5", "kivi-4", "kivi-2", "klt", "klt-10x"}) {
      const bool klt = profile_of(profile).kind == KvKind::klt;
      const auto cache = make_cache(s, profile);
      for (int64_t n = 1; n <= 3000; n += kSanitized ? 431 : n < 200 ? 1 : n < 700 ? 17 : 331) {
        for (int64_t i = 0; i < kLayers; ++i) {
          cache->layer(i).clear();
          if (klt) cache->layer(i).observe_queries(queries.data(), n);
          ASSERT_TRUE(cache->layer(i).append(tokens.key(0), tokens.value(0), n).ok());
          auto* layer = dynamic_cast<KltLayer*>(&cache->layer(i));
          for (int64_t h = 0; layer != nullptr && h < 3; ++h) {  // as the first step does
            layer->hot_keys(h).reserve(klt_hot_tokens(profile_of(profile), layer->n_in_pages(), n));
          }
        }
        const int64_t estimate = kv_bytes_estimate(layers_of(s, kLayers), profile_of(profile), n);
        if (klt && cache->stats().bytes_pages > 0) {  // coordinates without bits take less
          ASSERT_LE(cache->stats().bytes, estimate) << profile << " " << n;
          ASSERT_GT(cache->stats().bytes, estimate / 2) << profile << " " << n;
          continue;
        }
        ASSERT_EQ(cache->stats().bytes, estimate) << profile << " " << n;
      }
    }
  }
}

TEST(Cache, StatsAddUp) {
  const Heads s(6, 3, 64);
  const Tokens tokens(s, 1000);
  const auto cache = make_cache(s, "sals-25");
  for (int64_t i = 0; i < kLayers; ++i)
    ASSERT_TRUE(cache->layer(i).append(tokens.key(0), tokens.value(0), 1000).ok());
  const CacheStats stats = cache->stats();
  EXPECT_EQ(stats.n_tokens, 1000);
  EXPECT_EQ(stats.bytes_f16, kLayers * 1000 * 768);
  EXPECT_EQ(stats.n_layer_compressed, 2);  // 0, 1 and the last are dense
  EXPECT_EQ(stats.bytes_f16_compressed_layers, 2 * 1000 * 768);
  EXPECT_EQ(stats.bytes_compressed_layers, cache->layer(2).bytes().total() + cache->layer(3).bytes().total());
  EXPECT_EQ(stats.bytes - stats.bytes_compressed_layers, 3 * 1024 * 768);  // blocks of 64
  EXPECT_EQ(stats.bytes_f16_pages, 2 * 912 * 768);                         // 1000 - 16 - 64, in units of 16
  EXPECT_EQ(stats.bytes_pages, 2 * 15 * 64 * 216);
  cache->clear();
  EXPECT_EQ(cache->stats().bytes, 0);
}

// The project's targets for compressed layers, windows and the layer's own basis included.
TEST(Cache, CompressesAsPromised) {
  for (const int64_t n_head_kv : {2, 3}) {  // D = 128 and 192
    const Heads s(n_head_kv, n_head_kv, 64);
    const Tokens tokens(s, 7600);
    const auto ratio = [&](const char* profile, int64_t n) {
      const auto cache = make_cache(s, profile);
      EXPECT_TRUE(cache->layer(kCompressed).append(tokens.key(0), tokens.value(0), n).ok());
      const CacheStats stats = cache->stats();
      return static_cast<double>(stats.bytes_f16_compressed_layers) /
             static_cast<double>(stats.bytes_compressed_layers);
    };
    for (const int64_t n : {7600, 7590, 7551}) {  // the emptiest pages and the fullest windows
      EXPECT_GE(ratio("sals-25", n), 3.3) << n;
      EXPECT_GE(ratio("sals-12.5", n), 5.8) << n;
    }
    // Pages 6.1 and 9.5 as large as f16; at 7551 tokens the window is 111 and transforms weigh most.
    EXPECT_GE(ratio("klt", 7551), 4.8);
    EXPECT_GE(ratio("klt-10x", 7551), 7.0);
    EXPECT_GE(ratio("kivi-4", 7600), 3.0);
    EXPECT_GE(ratio("kivi-2", 7600), 4.9);
  }
}

TEST(Cache, RefusesImpossibleShapes) {
  const auto create = [](int64_t n_head, int64_t n_head_kv, int64_t head_dim,
                         const kernels::RopeTable& rope) {
    const Heads s(4, 2, 16);
    return KvCache::create(std::vector<KvLayerSpec>(3, {{n_head, n_head_kv, head_dim, 1.0F}, &rope}),
                           KvProfile(), nullptr, {})
        .status()
        .code();
  };
  const Heads s(4, 2, 16);
  EXPECT_EQ(create(5, 2, 16, s.rope), StatusCode::unsupported);
  EXPECT_EQ(create(4, 0, 16, s.rope), StatusCode::unsupported);
  EXPECT_EQ(create(4, 2, 8, s.rope), StatusCode::unsupported);  // rotates 16 of 8
  EXPECT_EQ(create(4, 2, 1024, s.rope), StatusCode::unsupported);
  EXPECT_EQ(create(4, 2, 16, s.rope), StatusCode::ok);
}

TEST(Cache, RefusesBasisThatDoesNotFit) {
  const Heads s(4, 2, 16);
  const Tokens tokens(s, 50);
  const auto create = [&](int64_t n_layer, int64_t rank) {
    auto file = std::make_shared<BasisFile>();
    KeyMoments moments(s.width());
    moments.add(tokens.k.data(), 50);
    for (int64_t i = 0; i < n_layer; ++i) file->layers.push_back(moments.leading(rank).value());
    return KvCache::create(layers_of(s, 5), profile_of("sals-25"), file, {}).status().code();
  };
  EXPECT_EQ(create(2, 32), StatusCode::invalid_file);
  EXPECT_EQ(create(5, 7), StatusCode::invalid_file);
  EXPECT_EQ(create(5, 8), StatusCode::ok);
}

}  // namespace
}  // namespace narrows::test
