// SALS pages against a reference in double that is made from the exact keys alone: Jacobi eigenvectors of the
// tokens that count, projection, rotation; values within half a step of the quantiser.
#include "kv/cache_data.h"
#include "kv/sals/sals_layer.h"

namespace narrows::test {
namespace {

struct Case {
  const char* profile;
  int64_t n_head_kv, head_dim, n_rot;
  int bits;
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.profile << " " << c.n_head_kv << "x" << c.head_dim;
}

class Sals : public testing::TestWithParam<Case> {
 protected:
  Heads heads_{GetParam().n_head_kv, GetParam().n_head_kv, GetParam().head_dim, GetParam().n_rot};
  int64_t d_ = heads_.width();
  std::unique_ptr<KvCache> cache_ = make_cache(heads_, GetParam().profile);
  SalsLayer& layer_ = dynamic_cast<SalsLayer&>(cache_->layer(kCompressed));
  int64_t rank_ = d_ / profile_of(GetParam().profile).rank_divisor;

  /// All pages of layer_ against the reference basis of positions [4, basis_end). Keys are compared as whole
  /// vectors: an error of the basis is spread over all coordinates.
  void expect_pages(const Tokens& tokens, int64_t basis_end) const {
    const auto u = jacobi_vectors(second_moments(tokens, 4, basis_end), d_);
    const auto p = projector(u, d_, rank_);
    const int64_t n = layer_.n_in_pages();
    ASSERT_GT(n, 0);
    const Decoded got(layer_, layer_.n_sink(), n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t pos = layer_.n_sink() + i;
      auto want = times(p, tokens.key(pos), d_);
      const double size = norm(want);
      heads_.rotate_row(want, pos);
      double error = 0;
      double dropped = 0;
      const auto exact = tokens.rotated_key(heads_, pos);
      for (int64_t c = 0; c < d_; ++c) {
        const auto j = static_cast<size_t>(c);
        error += std::pow(static_cast<double>(got.k[static_cast<size_t>(i * d_ + c)]) - want[j], 2);
        dropped += std::pow(exact[j] - want[j], 2);
      }
      // f16 latents: 2^-11 of their length; keys that waited in the window were rounded before, which moves
      // the basis too. Far below what the rank drops, so that a wrong rank or basis cannot pass.
      ASSERT_LT(std::sqrt(error), 3 * kHalfEps * size) << "position " << pos;
      if (i % 64 == 0) {
        ASSERT_GT(std::sqrt(dropped), 2 * std::sqrt(error)) << "the rank should drop more than rounding";
      }
    }
  }

  void expect_values(const Tokens& tokens) const {
    const int64_t n = layer_.n_in_pages();
    const Decoded got(layer_, layer_.n_sink(), n);
    const double levels = (1 << GetParam().bits) - 1;
    int64_t n_beyond_tenth = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float* v = tokens.value(layer_.n_sink() + i);
      for (int64_t g = 0; g < d_; g += 32) {
        const int64_t end = std::min(d_, g + 32);
        const auto [low, high] = std::minmax_element(v + g, v + end);
        const double zero = static_cast<double>(*low);
        const double step = (static_cast<double>(*high) - zero) / levels;
        // Half a step, and what rounding scale (times up to 15 codes), zero and a waiting token to f16 adds.
        const double bound = step / 2 + kHalfEps * (step * levels + 2 * std::fabs(zero) + 1);
        for (int64_t c = g; c < end; ++c) {
          const double error = std::fabs(static_cast<double>(got.v[static_cast<size_t>(i * d_ + c)]) -
                                         static_cast<double>(v[c]));
          ASSERT_LE(error, bound) << "position " << layer_.n_sink() + i << " channel " << c;
          n_beyond_tenth += error > step / 10 ? 1 : 0;
        }
      }
    }
    // Neither may they be better than their bits: errors are spread evenly over half a step.
    EXPECT_GT(n_beyond_tenth, n * d_ / 2);
  }
};

TEST_P(Sals, AppendedAtOnce) {
  const Tokens tokens(heads_, 900);
  ASSERT_TRUE(layer_.append(tokens.key(0), tokens.value(0), 900).ok());
  expect_pages(tokens, 900);
  expect_values(tokens);
}

TEST_P(Sals, BasisStopsAt4096) {
  const Tokens tokens(heads_, 4300);
  ASSERT_TRUE(layer_.append(tokens.key(0), tokens.value(0), 4300).ok());
  expect_pages(tokens, 4096);
  expect_values(tokens);
}

TEST_P(Sals, ConvertsWhenAnAppendCrossesTheThreshold) {
  const Tokens tokens(heads_, 900);
  const int64_t first = 300;
  ASSERT_TRUE(layer_.append(tokens.key(0), tokens.value(0), first).ok());
  EXPECT_EQ(layer_.bytes().n_tokens_in_pages, 0);
  EXPECT_EQ(layer_.bytes().basis, 0);
  ASSERT_TRUE(layer_.append(tokens.key(first), tokens.value(first), 900 - first).ok());
  EXPECT_EQ(layer_.bytes().basis, d_ * rank_ * 4);
  expect_pages(tokens, 900);
  expect_values(tokens);
}

TEST_P(Sals, ConvertsWhileDecoding) {
  const int64_t threshold = std::max<int64_t>(512, 2 * d_);
  const Tokens tokens(heads_, threshold + 200);
  ASSERT_TRUE(layer_.append(tokens.key(0), tokens.value(0), threshold - 3).ok());
  step_tokens(layer_, tokens, threshold - 3, threshold);
  EXPECT_EQ(layer_.bytes().n_tokens_in_pages,
            0);  // the token that crosses it was not there when its step began
  EXPECT_EQ(layer_.basis(), nullptr);
  step_tokens(layer_, tokens, threshold, threshold + 1);
  EXPECT_GT(layer_.bytes().n_tokens_in_pages, threshold - 16 - 64 - 16);
  expect_pages(tokens, threshold);
  step_tokens(layer_, tokens, threshold + 1, threshold + 200);
  expect_pages(tokens, threshold);  // later tokens are encoded with the same basis
  expect_values(tokens);
}

// The score is the paper's: (sum of query heads) U_r* U_r*^T k, so the leading half of the rank alone.
TEST_P(Sals, IndexPartIsTheLeadingHalf) {
  const Tokens tokens(heads_, 700);
  ASSERT_TRUE(layer_.append(tokens.key(0), tokens.value(0), 700).ok());
  const auto u = jacobi_vectors(second_moments(tokens, 4, 700), d_);
  const int64_t rank_score = std::max<int64_t>(1, rank_ / 2);
  ASSERT_EQ(layer_.layout().rank_score, rank_score);
  const auto p = projector(u, d_, rank_score);
  std::vector<kernels::f16_t> z(static_cast<size_t>(rank_));
  for (int64_t i = 0; i < layer_.n_in_pages(); i += 13) {
    const auto token = static_cast<int32_t>(i);
    layer_.gather_latents(&token, 1, z.data(), 1);
    double got = 0;
    for (int64_t c = 0; c < rank_score; ++c) {
      float x = 0;
      kernels::ops().f16_to_f32(&z[static_cast<size_t>(c)], &x, 1);
      got += static_cast<double>(x) * static_cast<double>(x);
    }
    const double want = norm(times(p, tokens.key(layer_.n_sink() + i), d_));
    ASSERT_NEAR(std::sqrt(got), want, 3 * kHalfEps * want) << i;
  }
}

TEST_P(Sals, ClearDropsItsOwnBasisOnly) {
  const Tokens first(heads_, 700, 1);
  const Tokens second(heads_, 700, 2);
  ASSERT_TRUE(layer_.append(first.key(0), first.value(0), 700).ok());
  layer_.clear();
  EXPECT_EQ(layer_.bytes().total(), 0);
  ASSERT_TRUE(layer_.append(second.key(0), second.value(0), 700).ok());
  expect_pages(second, 700);

  auto file = std::make_shared<BasisFile>();
  KeyMoments moments(d_);
  moments.add(first.key(4), 696);
  for (int64_t i = 0; i < kLayers; ++i) file->layers.push_back(moments.leading(d_).value());
  const auto cache = make_cache(heads_, GetParam().profile, file);
  KvLayer& shared = cache->layer(kCompressed);
  ASSERT_TRUE(shared.append(second.key(0), second.value(0), 300).ok());
  EXPECT_GT(shared.bytes().n_tokens_in_pages, 0);
  EXPECT_EQ(shared.bytes().basis, 0);
  shared.clear();
  ASSERT_TRUE(shared.append(second.key(0), second.value(0), 300).ok());
  EXPECT_GT(shared.bytes().n_tokens_in_pages, 0);
}

TEST_P(Sals, RefusesLatentsBeyondHalf) {
  // Every coordinate fits f16, but the key is longer than 65504 and lies along one eigenvector.
  Tokens tokens(heads_, 700);
  for (int64_t i = 0; i < d_; ++i) tokens.k[static_cast<size_t>(300 * d_ + i)] = 30000.0F;
  const Status s = layer_.append(tokens.key(0), tokens.value(0), 700);
  EXPECT_EQ(s.code(), StatusCode::non_finite);
  EXPECT_NE(s.message().find("token 300 "), std::string::npos) << s.message();
  EXPECT_EQ(layer_.n_tokens(), 0);
  EXPECT_EQ(layer_.bytes().total(), 0);  // nor is a basis kept that was made from it
}

INSTANTIATE_TEST_SUITE_P(Shapes, Sals,
                         testing::Values(Case{"sals-25", 3, 16, 0, 4}, Case{"sals-12.5", 3, 16, 0, 2},
                                         Case{"sals-25", 1, 80, 60, 4}, Case{"sals-12.5", 2, 20, 0, 2},
                                         Case{"sals-12.5", 1, 64, 0, 2}));

}  // namespace
}  // namespace narrows::test
