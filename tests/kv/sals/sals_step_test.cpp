// Score and selection against the paper's formula in double, made from the exact keys: s_j = q U_r* U_r*^T
// k_j with q the sum of the query heads of each KV head, nothing rotated; and what happens at the edges of a
// budget.
#include "kv/sals/sals_layer.h"
#include "kv/sals/sals_stages.h"
#include "kv/step/step_runner.h"

namespace narrows::test {
namespace {

struct Case {
  const char* profile;
  int64_t n_head, n_head_kv, head_dim;
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.profile << " heads " << c.n_head << "/" << c.n_head_kv << " of " << c.head_dim;
}

class Stages : public testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kTokens = 1300;
  Heads heads_{GetParam().n_head, GetParam().n_head_kv, GetParam().head_dim};
  KvProfile profile_ = profile_of(GetParam().profile);
  Tokens tokens_{heads_, kTokens + 1};
  std::unique_ptr<KvCache> cache_ = make_cache(heads_, GetParam().profile);
  SalsLayer& layer_ = dynamic_cast<SalsLayer&>(cache_->layer(kCompressed));

  void SetUp() override { ASSERT_TRUE(layer_.append(tokens_.key(0), tokens_.value(0), kTokens).ok()); }

  /// Scores of the tokens in pages, in double.
  std::vector<double> reference_scores(const std::vector<float>& q) const {
    const int64_t d = heads_.width();
    const auto u = jacobi_vectors(second_moments(tokens_, 4, kTokens), d);
    const auto p = projector(u, d, std::max<int64_t>(1, d / profile_.rank_divisor / 2));
    std::vector<float> joint(static_cast<size_t>(d));
    for (int64_t h = 0; h < heads_.shape.n_head; ++h) {
      const int64_t g = h / heads_.shape.group();
      for (int64_t i = 0; i < heads_.shape.head_dim; ++i) {
        joint[static_cast<size_t>(g * heads_.shape.head_dim + i)] +=
            q[static_cast<size_t>(h * heads_.shape.head_dim + i)];
      }
    }
    const auto projected = times(p, joint.data(), d);
    std::vector<double> scores;
    for (int64_t i = 0; i < layer_.n_in_pages(); ++i) {
      double dot = 0;
      const float* k = tokens_.key(layer_.n_sink() + i);
      for (int64_t c = 0; c < d; ++c) dot += projected[static_cast<size_t>(c)] * static_cast<double>(k[c]);
      scores.push_back(dot);
    }
    return scores;
  }
};

TEST_P(Stages, ScoresAreThePapers) {
  const auto q = random_query(heads_, 3);
  StepScratch scratch(heads_.shape, 2);
  std::vector<float> got(static_cast<size_t>(layer_.n_page() * kPageTokens),
                         std::numeric_limits<float>::quiet_NaN());
  for (int i = 0; i < 2; ++i)
    score_pages(layer_, q.data(), part_of(layer_.n_page(), i, 2), scratch.thread(i), got.data());
  const auto want = reference_scores(q);
  double size = 0;
  for (const double x : want) size += x * x / static_cast<double>(want.size());
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 5e-3 * std::sqrt(size)) << i;
}

TEST_P(Stages, StepReadsTheBest) {
  StepScratch scratch(heads_.shape, 2);
  const auto q = random_query(heads_, 4);
  const auto want = reference_scores(q);
  const int64_t n_in_pages = layer_.n_in_pages();
  ASSERT_EQ(run_step(layer_, scratch, tokens_, kTokens, q).size(), q.size());
  ASSERT_EQ(layer_.n_in_pages(), n_in_pages) << "the step should not have encoded";
  const int64_t budget = profile_.budget_at(kTokens + 1);
  const auto chosen = layer_.last_selection(0);
  if (budget >= n_in_pages) {
    EXPECT_FALSE(chosen.has_value());
    return;
  }
  ASSERT_TRUE(chosen.has_value());
  ASSERT_EQ(static_cast<int64_t>(chosen->size()), budget);
  std::vector<bool> taken(want.size());
  double lowest_taken = 1e30;
  int32_t last = -1;
  for (const int32_t pos : *chosen) {
    ASSERT_GT(pos, last);
    last = pos;
    const auto i = static_cast<size_t>(pos - layer_.n_sink());
    ASSERT_LT(i, want.size());
    taken[i] = true;
    lowest_taken = std::min(lowest_taken, want[i]);
  }
  double highest_left = -1e30;
  double size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (!taken[i]) highest_left = std::max(highest_left, want[i]);
    size += want[i] * want[i] / static_cast<double>(want.size());
  }
  EXPECT_GE(lowest_taken, highest_left - 1e-2 * std::sqrt(size));  // but for scores that rounding makes equal
}

// A query that is not finite must not lead the selection out of its arrays; the output cannot be saved.
TEST_P(Stages, NonFiniteQueryIsContained) {
  StepScratch scratch(heads_.shape, 2);
  for (const float x :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 3e38F}) {
    auto q = random_query(heads_, 5);
    q[1] = x;
    std::vector<float> scores(static_cast<size_t>(layer_.n_page() * kPageTokens));
    score_pages(layer_, q.data(), {0, layer_.n_page()}, scratch.thread(0), scores.data());
    for (int64_t i = 0; i < layer_.n_in_pages(); ++i)
      ASSERT_TRUE(std::isfinite(scores[static_cast<size_t>(i)]));
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Stages,
                         testing::Values(Case{"sals-25", 9, 3, 16}, Case{"sals-12.5:budget=1", 4, 4, 12},
                                         Case{"sals-25:budget=64", 7, 1, 80},
                                         Case{"sals-12.5:budget=65", 6, 2, 20},
                                         Case{"sals-25:budget=20000", 3, 3, 16}));

TEST(Budget, IsHeldWithinWhatIsThere) {
  const auto count = [](const char* profile, int64_t n_in_pages, int64_t n_kv) {
    return count_selected(profile_of(profile), n_in_pages, n_kv);
  };
  EXPECT_EQ(count("sals-25", 300, 396), 300);
  EXPECT_EQ(count("sals-25", 432, 520), 432);
  EXPECT_EQ(count("sals-25", 433, 520), 432);
  EXPECT_EQ(count("sals-25", 8000, 8192), 8192 / 8 - 80);
  EXPECT_EQ(count("sals-25:budget=all", 8000, 8192), 8000);
  EXPECT_EQ(count("sals-25:budget=100", 8000, 8192), 100);
  EXPECT_EQ(count("sals-25:budget=100", 0, 20), 0);
}

TEST(Part, CoversEverythingOnce) {
  for (const int64_t n : {0, 1, 2, 7, 128}) {
    for (const int n_threads : {1, 2, 3, 8}) {
      int64_t end = 0;
      for (int i = 0; i < n_threads; ++i) {
        const Part p = part_of(n, i, n_threads);
        EXPECT_EQ(p.begin, end);
        EXPECT_LE(p.end - p.begin, n / n_threads + 1);
        end = p.end;
      }
      EXPECT_EQ(end, n);
      // The newest block is stored by the last thread while the others read.
      if (n > 0) {
        EXPECT_GT(part_of(n, n_threads - 1, n_threads).end, part_of(n, n_threads - 1, n_threads).begin);
      }
    }
  }
}

}  // namespace
}  // namespace narrows::test
