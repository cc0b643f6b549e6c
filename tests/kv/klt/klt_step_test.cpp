// Scoring of klt pages against its definition in double, and what it selects against exact probabilities.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kv/klt/klt_work.h"
#include "kv/step/step_runner.h"

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

constexpr int64_t kTokens = 1300;

class KltStages : public testing::TestWithParam<Case> {
 protected:
  Heads heads_{GetParam().n_head, GetParam().n_head_kv, GetParam().head_dim, GetParam().n_rot};
  KvProfile profile_ = profile_of(GetParam().profile);
  Tokens tokens_{heads_, kTokens + 1};
  std::unique_ptr<KvCache> cache_ = make_cache(heads_, GetParam().profile);
  KltLayer& layer_ = dynamic_cast<KltLayer&>(cache_->layer(kCompressed));

  void SetUp() override {
    for (uint32_t i = 0; i < 100; ++i) {  // in all directions, or the transforms save bits where a test looks
      const auto q = random_query(heads_, 100 + i);
      layer_.observe_queries(q.data(), 1);
    }
    ASSERT_TRUE(layer_.append(tokens_.key(0), tokens_.value(0), kTokens).ok());
    ASSERT_GT(layer_.n_page(), 10);
  }

  /// A key before RoPE under the mean of the rotations of a block's positions.
  std::vector<double> mean_over_block(const std::vector<double>& key, int64_t block) const {
    std::vector<double> mean(key.size());
    for (int64_t pos = block; pos < block + profile_.block; ++pos) {
      std::vector<double> turned_key = key;
      heads_.rotate(turned_key.data(), pos);
      for (size_t c = 0; c < key.size(); ++c) mean[c] += turned_key[c] / static_cast<double>(profile_.block);
    }
    return mean;
  }

  /// A query at position kTokens, turned and scaled, in double.
  std::vector<double> turned(const std::vector<float>& q) const {
    std::vector<double> row(q.begin(), q.end());
    heads_.rotate_row(row, kTokens);
    for (double& x : row) x /= std::sqrt(static_cast<double>(heads_.shape.head_dim));
    return row;
  }
};

// With every coordinate in the index, a score is the stored key under the mean of its block's rotations, but
// for the query's rounding to bytes and bits beyond the sixth.
TEST_P(KltStages, ScoresAreMeansOverABlocksRotations) {
  const int64_t d = heads_.shape.head_dim, group = heads_.shape.group(), width = heads_.width();
  const auto q = random_query(heads_, 3);
  const auto query = turned(q);
  const std::vector<float> q_float(query.begin(), query.end());
  KltWork work(1);
  const int64_t n = layer_.n_in_pages();
  work.fit(layer_, profile_, n, n);
  for (const Part slices : {Part{0, 5}, Part{5, kSlices}})  // any share of a thread
    klt_score(layer_, profile_, q_float.data(), slices, work, *work.threads[0]);

  Decoded stored(layer_, layer_.n_sink(), n);
  double error = 0, size = 0;
  int64_t count = 0;
  for (int64_t h = 0; h < heads_.shape.n_head; ++h) {
    const int64_t g = h / group;
    double mean = 0;
    std::vector<double> got, want;
    for (int64_t i = 0; i < n; ++i) {
      const float p = work.scores[static_cast<size_t>(h * work.ld + i)];
      if (p == 0) continue;  // too far below the largest to tell
      int64_t slice = 0;
      while (i / kPageTokens >= part_of(layer_.n_page(), static_cast<int>(slice), kSlices).end) ++slice;
      got.push_back(std::log(static_cast<double>(p)) +
                    static_cast<double>(work.part_max[static_cast<size_t>(h * 2 * kSlices + slice)]));
      const float* k = stored.k.data() + i * width + g * d;
      std::vector<double> plain(k, k + d);
      heads_.rotate(plain.data(), -(layer_.n_sink() + i));
      const int64_t block = layer_.n_sink() + i / profile_.block * profile_.block;
      const auto key = mean_over_block(plain, block);
      double score = 0;
      for (int64_t c = 0; c < d; ++c)
        score += query[static_cast<size_t>(h * d + c)] * key[static_cast<size_t>(c)];
      want.push_back(score);
      mean += score;
    }
    ASSERT_GT(want.size(), static_cast<size_t>(n / 2));
    mean /= static_cast<double>(want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      error += (got[i] - want[i]) * (got[i] - want[i]);
      size += (want[i] - mean) * (want[i] - mean);
      ++count;
    }
  }
  EXPECT_LT(std::sqrt(error / size), 0.03)
      << "of a spread of " << std::sqrt(size / static_cast<double>(count));
}

INSTANTIATE_TEST_SUITE_P(Shapes, KltStages,
                         testing::Values(Case{"klt:k=4,rank=128,block=16", 9, 3, 32, 0},
                                         Case{"klt:k=4,rank=128,block=32", 4, 2, 48, 0},
                                         Case{"klt:k=4,rank=128,block=64", 6, 3, 32, 0},
                                         Case{"klt:k=4,rank=64,block=64", 4, 2, 20, 12},
                                         Case{"klt:k=4,rank=512,block=64,sinks=3", 4, 4, 128, 0}));

class KltSelection : public KltStages {};

// Queries that look for one stored token each. What is read must hold nearly all of the exact probability
// that scores of exact keys under their blocks' mean rotation (the method, without its codes) would have
// kept.
TEST_P(KltSelection, FindsWhatTheQueryLooksFor) {
  const int64_t d = heads_.shape.head_dim, group = heads_.shape.group(), n = layer_.n_in_pages();
  StepScratch scratch(heads_.shape, 2);
  std::mt19937 random(11);
  std::vector<float> q(static_cast<size_t>(heads_.shape.n_head * d));
  std::vector<int64_t> sought;
  for (int64_t h = 0; h < heads_.shape.n_head; ++h) {
    sought.push_back(layer_.n_sink() + static_cast<int64_t>(random() % static_cast<uint32_t>(n)));
    const float* k = tokens_.key(sought.back()) + h / group * d;
    std::vector<double> row(k, k + d);
    double square = 0;
    for (const double x : row) square += x * x;
    heads_.rotate(row.data(), sought.back() - kTokens);
    const double gain = 14 * std::sqrt(static_cast<double>(d)) / square;  // a score of 14
    for (int64_t c = 0; c < d; ++c)
      q[static_cast<size_t>(h * d + c)] = static_cast<float>(row[static_cast<size_t>(c)] * gain);
  }
  const auto query = turned(q);
  ASSERT_EQ(run_step(layer_, scratch, tokens_, kTokens, q).size(), q.size());
  ASSERT_EQ(layer_.n_in_pages(), n) << "the step should not have encoded";
  double kept = 0, by_method = 0;
  bool differ = false;
  for (int64_t g = 0; g < heads_.shape.n_head_kv; ++g) {
    const auto chosen = layer_.last_selection(g);
    ASSERT_TRUE(chosen.has_value());
    ASSERT_EQ(static_cast<int64_t>(chosen->size()), profile_.budget);
    for (size_t i = 1; i < chosen->size(); ++i) ASSERT_GT((*chosen)[i], (*chosen)[i - 1]);
    ASSERT_GE(chosen->front(), layer_.n_sink());
    ASSERT_LT(chosen->back(), layer_.n_sink() + n);
    differ = differ || !std::equal(chosen->begin(), chosen->end(), layer_.last_selection(0)->begin());
    std::vector<std::vector<double>> mean_key;
    for (int64_t i = 0; i < n; ++i) {
      const float* k = tokens_.key(layer_.n_sink() + i) + g * d;
      const int64_t block = layer_.n_sink() + i / profile_.block * profile_.block;
      mean_key.push_back(mean_over_block(std::vector<double>(k, k + d), block));
    }
    std::vector<double> pooled(static_cast<size_t>(n)), guessed(pooled.size());
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      std::vector<double> p, guess;
      double sum = 0, guess_sum = 0;
      for (int64_t t = 0; t <= kTokens; ++t) {
        const auto key = tokens_.rotated_key(heads_, t);
        double s = 0;
        for (int64_t c = 0; c < d; ++c)
          s += query[static_cast<size_t>(h * d + c)] * key[static_cast<size_t>(g * d + c)];
        p.push_back(std::exp(s));
        sum += p.back();
        if (t >= layer_.n_sink() && t < layer_.n_sink() + n) {
          s = 0;
          const auto& mean = mean_key[static_cast<size_t>(t - layer_.n_sink())];
          for (int64_t c = 0; c < d; ++c)
            s += query[static_cast<size_t>(h * d + c)] * mean[static_cast<size_t>(c)];
        }
        guess.push_back(std::exp(s));
        guess_sum += guess.back();
      }
      for (int64_t i = 0; i < n; ++i) {
        pooled[static_cast<size_t>(i)] += p[static_cast<size_t>(layer_.n_sink() + i)] / sum;
        guessed[static_cast<size_t>(i)] += guess[static_cast<size_t>(layer_.n_sink() + i)] / guess_sum;
      }
    }
    for (const int32_t pos : *chosen) kept += pooled[static_cast<size_t>(pos - layer_.n_sink())];
    std::vector<size_t> order(pooled.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return guessed[a] > guessed[b]; });
    for (size_t i = 0; i < static_cast<size_t>(profile_.budget); ++i) by_method += pooled[order[i]];
  }
  EXPECT_GT(kept, 0.95 * by_method);
  EXPECT_GT(by_method, 0.5 * static_cast<double>(heads_.shape.n_head)) << "or nothing was there to be found";
  if (heads_.shape.n_head_kv > 1) {
    EXPECT_TRUE(differ) << "each KV head chooses for itself";
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, KltSelection,
                         testing::Values(Case{"klt:budget=60,mass=1,block=16", 9, 3, 64, 0},
                                         Case{"klt:budget=60,mass=1", 9, 3, 64, 0},
                                         Case{"klt:budget=60,mass=1,block=16", 4, 4, 128, 0},
                                         Case{"klt-10x:budget=100,mass=1,block=16", 4, 2, 128, 0}));

// What is chosen out of given scores, against a full sort in double.
class KltChoice : public KltStages {
 protected:
  void SetUp() override {
    KltStages::SetUp();
    work_ = std::make_unique<KltWork>(2);
    work_->fit(layer_, profile_, layer_.n_in_pages(), layer_.n_in_pages());
  }

  /// Softmax parts of scores that `score` gives for (query head, token of the pages), and one exact slice a
  /// head.
  template <class Score>
  void fill(Score&& score, float exact) {
    const int64_t n_head = heads_.shape.n_head;
    work_->part_sum.assign(work_->part_sum.size(), 0);
    work_->part_max.assign(work_->part_max.size(), std::numeric_limits<float>::lowest());
    pooled_.assign(static_cast<size_t>(heads_.shape.n_head_kv * layer_.n_in_pages()), 0);
    for (int64_t h = 0; h < n_head; ++h) {
      std::vector<double> p;
      double total = std::exp(static_cast<double>(exact));
      for (int64_t i = 0; i < layer_.n_in_pages(); ++i) {
        p.push_back(std::exp(static_cast<double>(score(h, i))));
        total += p.back();
      }
      for (size_t i = 0; i < p.size(); ++i)
        pooled_[static_cast<size_t>(h / heads_.shape.group() * layer_.n_in_pages()) + i] += p[i] / total;
      for (int s = 0; s < kSlices; ++s) {
        const Part pages = part_of(layer_.n_page(), s, kSlices);
        if (pages.begin == pages.end) continue;
        const auto at = static_cast<size_t>(h * 2 * kSlices + s);
        float* row = work_->scores.data() + h * work_->ld;
        for (int64_t i = pages.begin * kPageTokens; i < pages.end * kPageTokens; ++i) row[i] = score(h, i);
        kernels::ops().softmax_part(row + pages.begin * kPageTokens, (pages.end - pages.begin) * kPageTokens,
                                    &work_->part_max[at], &work_->part_sum[at]);
      }
      work_->part_max[static_cast<size_t>((h * 2 + 1) * kSlices + 3)] = exact;
      work_->part_sum[static_cast<size_t>((h * 2 + 1) * kSlices + 3)] = 1;
    }
  }

  std::vector<int32_t> choose(int64_t head_kv, int64_t budget, double mass) {
    KvProfile profile = profile_;
    profile.mass = mass;
    klt_pool(layer_, profile, {0, 7}, *work_, *work_->threads[0]);
    klt_pool(layer_, profile, {7, kSlices}, *work_, *work_->threads[1]);
    klt_select(layer_, profile, budget, head_kv, *work_, *work_->threads[0]);
    const int32_t* first = work_->selected.data() + head_kv * work_->ld;
    return {first, first + work_->n_selected[static_cast<size_t>(head_kv)]};
  }

  double pooled(int64_t head_kv, int64_t token) const {
    return pooled_[static_cast<size_t>(head_kv * layer_.n_in_pages() + token)];
  }

  std::unique_ptr<KltWork> work_;
  std::vector<double> pooled_;  ///< [n_head_kv, tokens]
};

TEST_P(KltChoice, IsTheBestOfTheBudget) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> scores(static_cast<size_t>(heads_.shape.n_head * layer_.n_in_pages()));
  for (float& s : scores) s = normal(random);
  fill([&](int64_t h, int64_t i) { return scores[static_cast<size_t>(h * layer_.n_in_pages() + i)]; }, 2);
  for (int64_t g = 0; g < heads_.shape.n_head_kv; ++g) {
    std::vector<double> sorted;
    for (int64_t i = 0; i < layer_.n_in_pages(); ++i) sorted.push_back(pooled(g, i));
    std::sort(sorted.rbegin(), sorted.rend());
    for (const int64_t budget : {int64_t{1}, int64_t{2}, int64_t{37}, int64_t{500}, layer_.n_in_pages()}) {
      const auto chosen = choose(g, budget, 1);
      ASSERT_EQ(static_cast<int64_t>(chosen.size()), budget);
      ASSERT_TRUE(std::is_sorted(chosen.begin(), chosen.end()));
      for (const int32_t t : chosen)
        EXPECT_GE(pooled(g, t), sorted[static_cast<size_t>(budget - 1)] * (1 - 1e-5)) << budget;
    }
  }
}

TEST_P(KltChoice, StopsWhenTheMassIsHeld) {
  std::mt19937 random(6);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> scores(static_cast<size_t>(heads_.shape.n_head * layer_.n_in_pages()));
  for (float& s : scores) s = normal(random);
  fill([&](int64_t h, int64_t i) { return scores[static_cast<size_t>(h * layer_.n_in_pages() + i)]; }, 4);
  const double group = static_cast<double>(heads_.shape.group());
  for (int64_t g = 0; g < heads_.shape.n_head_kv; ++g) {
    double all = 0;
    std::vector<double> sorted;
    for (int64_t i = 0; i < layer_.n_in_pages(); ++i) {
      sorted.push_back(pooled(g, i));
      all += sorted.back();
    }
    std::sort(sorted.rbegin(), sorted.rend());
    for (const double mass : {0.999, 0.99, 0.9, 0.6}) {
      const auto chosen = choose(g, layer_.n_in_pages(), mass);
      double held = 0;
      for (const int32_t t : chosen) held += pooled(g, t);
      EXPECT_GE(held, all - (1 - mass) * group - 1e-5) << mass;
      // Not many more than the fewest that would do: a bin is an eighth of an octave.
      double fewest = 0;
      size_t n = 0;
      while (n < sorted.size() && fewest < all - (1 - mass) * group) fewest += sorted[n++];
      size_t like_the_last = n;
      while (like_the_last < sorted.size() && n > 0 && sorted[like_the_last] > sorted[n - 1] / 1.126)
        ++like_the_last;
      EXPECT_LE(chosen.size(), like_the_last) << mass;
      EXPECT_LT(chosen.size(), sorted.size()) << mass;
    }
    EXPECT_EQ(choose(g, 3, 0.9).size(), 3U) << "the budget is a limit all the same";
  }
  fill([](int64_t, int64_t) { return 0.0F; }, 30);
  EXPECT_TRUE(choose(0, layer_.n_in_pages(), 0.99).empty()) << "all attention is on exact tokens";
}

TEST_P(KltChoice, TiesGoToOlderTokens) {
  fill([](int64_t, int64_t i) { return i % 3 == 0 ? 1.0F : 0.0F; }, 0);
  const int64_t n = layer_.n_in_pages(), best = ceil_div(n, 3);
  const auto chosen = choose(0, best + 5, 1);
  ASSERT_EQ(static_cast<int64_t>(chosen.size()), best + 5);
  int64_t of_the_rest = 0;
  for (const int32_t t : chosen) of_the_rest += t % 3 != 0 ? 1 : 0;
  EXPECT_EQ(of_the_rest, 5);
  for (const int32_t t : {1, 2, 4, 5, 7})
    EXPECT_TRUE(std::binary_search(chosen.begin(), chosen.end(), t)) << t;
}

TEST_P(KltChoice, ScoresThatAreNotNumbersChooseNothing) {
  fill([](int64_t, int64_t) { return 1.0F; }, 0);
  for (float& p : work_->scores) p = std::numeric_limits<float>::quiet_NaN();
  for (float& p : work_->part_sum) p = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(choose(0, 50, 0.99).empty());
}

INSTANTIATE_TEST_SUITE_P(Shapes, KltChoice,
                         testing::Values(Case{"klt", 9, 3, 64, 0}, Case{"klt", 4, 4, 128, 0},
                                         Case{"klt", 7, 1, 64, 0}));

// A key that was kept is the key that would be rebuilt: a step's output has the same bits whatever steps came
// before it.
class KltHistory : public KltStages {};

TEST_P(KltHistory, DoesNotMatter) {
  const auto q = random_query(heads_, 77);
  // The same tokens arrive in both caches; only the queries of the steps between differ.
  const auto run = [&](uint32_t seed) {
    auto cache = make_cache(heads_, GetParam().profile);
    auto& layer = dynamic_cast<KltLayer&>(cache->layer(kCompressed));
    for (uint32_t i = 0; i < 100; ++i) layer.observe_queries(random_query(heads_, 100 + i).data(), 1);
    EXPECT_TRUE(layer.append(tokens_.key(0), tokens_.value(0), kTokens - 40).ok());
    StepScratch own(heads_.shape, 2);
    for (int64_t t = kTokens - 40; t < kTokens; ++t)
      EXPECT_FALSE(
          run_step(layer, own, tokens_, t, random_query(heads_, seed + static_cast<uint32_t>(t))).empty());
    // Nor what another layer left in the work that they share.
    if (seed == 9000) {
      auto& latents = static_cast<KltWork&>(*own.work).slice_latents;
      std::fill_n(latents.data(), latents.size(), std::numeric_limits<float>::quiet_NaN());
    }
    return run_step(layer, own, tokens_, kTokens, q);
  };
  EXPECT_EQ(run(1000), run(9000));
}

INSTANTIATE_TEST_SUITE_P(Shapes, KltHistory,
                         testing::Values(Case{"klt:budget=70", 9, 3, 64, 0},
                                         Case{"klt:budget=5000", 9, 3, 32, 0},
                                         Case{"klt:budget=all", 4, 2, 32, 0},
                                         Case{"klt-10x:budget=300,mass=1", 4, 4, 128, 0}));

// Layers of several shapes begin a step one after another, and then run in the same work: neither finds it
// too small, whichever came first, nor gives other numbers than alone.
TEST(KltWork, ServesLayersOfSeveralShapes) {
  const Heads small(4, 2, 32), large(8, 4, 64, 48);
  const Tokens few(small, 1010), more(large, 1010);
  for (const bool large_has_pages : {false, true}) {
    const auto make = [&](const Heads& s, const Tokens& tokens, int64_t n) {
      auto cache = make_cache(s, "klt:budget=100");
      EXPECT_TRUE(cache->layer(kCompressed).append(tokens.key(0), tokens.value(0), n).ok());
      return cache;
    };
    const auto a = make(small, few, 1000), a_alone = make(small, few, 1000);
    const auto b = make(large, more, large_has_pages ? 1000 : 100),
               b_alone = make(large, more, large_has_pages ? 1000 : 100);
    StepScratch shared(std::vector{small.shape, large.shape}, 2), own_a(small.shape, 2),
        own_b(large.shape, 2);
    for (int64_t t = 1000; t < 1010; ++t) {
      const int64_t tb = b->layer(kCompressed).n_tokens();
      const auto qa = random_query(small, static_cast<uint32_t>(t)),
                 qb = random_query(large, static_cast<uint32_t>(t));
      std::vector<float> out_a(qa.size()), out_b(qb.size());
      KvLayer &la = a->layer(kCompressed), &lb = b->layer(kCompressed);
      ASSERT_TRUE(la.begin_step(shared).ok() && lb.begin_step(shared).ok());
      const DecodeStep steps[] = {{qa.data(), few.key(t), few.value(t), out_a.data()},
                                  {qb.data(), more.key(tb), more.value(tb), out_b.data()}};
      for (int l = 0; l < 2; ++l) {
        KvLayer& layer = l == 0 ? la : lb;
        for (int phase = 0; phase < layer.n_phase(); ++phase) {
          for (int i = 0; i < 2; ++i) layer.run_phase(phase, steps[l], shared, i, 2);
        }
        layer.end_step();
      }
      ASSERT_EQ(out_a, run_step(a_alone->layer(kCompressed), own_a, few, t, qa)) << t;
      ASSERT_EQ(out_b, run_step(b_alone->layer(kCompressed), own_b, more, tb, qb)) << t;
    }
  }
}

}  // namespace
}  // namespace narrows::test
