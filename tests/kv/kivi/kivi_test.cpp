// KIVI pages against the definition: rotated keys in groups of 32 consecutive tokens a channel, values in
// groups of 32 channels a token; decoded numbers within half a step of exactly those groups.
#include "kv/cache_data.h"
#include "kv/kivi/kivi_layer.h"

namespace narrows::test {
namespace {

struct Case {
  const char* profile;
  int64_t n_head_kv, head_dim;
  int bits;
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.profile << " " << c.n_head_kv << "x" << c.head_dim;
}

class Kivi : public testing::TestWithParam<Case> {
 protected:
  Heads heads_{GetParam().n_head_kv, GetParam().n_head_kv, GetParam().head_dim};
  int64_t d_ = heads_.width();
  std::unique_ptr<KvCache> cache_ = make_cache(heads_, GetParam().profile);
  KvLayer& layer_ = cache_->layer(kCompressed);
  double levels_ = (1 << GetParam().bits) - 1;

  /// |got - want| of a group whose exact numbers are `want`; returns how many are off by a tenth of a step.
  int64_t expect_group(const std::vector<double>& want, const std::vector<double>& got,
                       const std::string& note) const {
    const auto [low, high] = std::minmax_element(want.begin(), want.end());
    const double step = (*high - *low) / levels_;
    const double bound =
        step / 2 + kHalfEps * (step * levels_ + 2 * std::fabs(*low) + std::fabs(*high) + 0.1);
    int64_t n_beyond_tenth = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_LE(std::fabs(got[i] - want[i]), bound) << note << " " << i;
      n_beyond_tenth += std::fabs(got[i] - want[i]) > step / 10 ? 1 : 0;
    }
    return n_beyond_tenth;
  }

  void expect_pages(const Tokens& tokens) const {
    constexpr int64_t kSink = 16;
    const int64_t n = layer_.bytes().n_tokens_in_pages;
    ASSERT_GT(n, 0);
    ASSERT_EQ(n % 32, 0);
    const Decoded got(layer_, kSink, n);
    int64_t coarse = 0;
    for (int64_t unit = 0; unit < n; unit += 32) {
      std::vector<std::vector<double>> keys;
      for (int64_t t = unit; t < unit + 32; ++t) keys.push_back(tokens.rotated_key(heads_, kSink + t));
      for (int64_t c = 0; c < d_; ++c) {
        std::vector<double> want, have;
        for (int64_t t = 0; t < 32; ++t) {
          want.push_back(keys[static_cast<size_t>(t)][static_cast<size_t>(c)]);
          have.push_back(static_cast<double>(got.k[static_cast<size_t>((unit + t) * d_ + c)]));
        }
        coarse += expect_group(want, have, "channel " + std::to_string(c) + " unit " + std::to_string(unit));
      }
    }
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t g = 0; g < d_; g += 32) {
        const int64_t end = std::min(d_, g + 32);
        const float* v = tokens.value(kSink + t);
        coarse += expect_group(std::vector<double>(v + g, v + end),
                               std::vector<double>(got.v.begin() + t * d_ + g, got.v.begin() + t * d_ + end),
                               "value");
      }
    }
    EXPECT_GT(coarse, n * d_);  // of 2 n D numbers: not better than the bits allow
  }
};

TEST_P(Kivi, AppendedAtOnce) {
  const Tokens tokens(heads_, 500);
  ASSERT_TRUE(layer_.append(tokens.key(0), tokens.value(0), 500).ok());
  expect_pages(tokens);
}

TEST_P(Kivi, GroupsMayStraddleAppends) {
  const Tokens tokens(heads_, 500);
  for (int64_t n = 0; n < 500; n += 50) ASSERT_TRUE(layer_.append(tokens.key(n), tokens.value(n), 50).ok());
  expect_pages(tokens);
}

TEST_P(Kivi, SteppedFromTheWindow) {
  const Tokens tokens(heads_, 300);
  step_tokens(layer_, tokens, 0, 300);
  expect_pages(tokens);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Kivi,
                         testing::Values(Case{"kivi-4", 3, 16, 4}, Case{"kivi-2", 3, 16, 2},
                                         Case{"kivi-2", 1, 80, 2}, Case{"kivi-4", 2, 20, 4}));

}  // namespace
}  // namespace narrows::test
