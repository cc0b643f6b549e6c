// A klt layer that is lent threads stores what it stores without: transforms, pages, errors.
#include <gtest/gtest.h>

#include <limits>
#include <thread>

#include "base/workers.h"
#include "kv/cache_data.h"
#include "kv/klt/klt_layer.h"

namespace narrows::test {
namespace {

KltLayer& klt_layer(KvCache& cache) { return static_cast<KltLayer&>(cache.layer(kCompressed)); }

/// Every task on a thread of its own, the last first.
class Backwards final : public Workers {
 public:
  explicit Backwards(int n_threads) : n_threads_(n_threads) {}
  int n_threads() const override { return n_threads_; }
  void for_each_thread(int64_t n, const std::function<void(int64_t, int)>& task) override {
    n_task += n;
    std::vector<std::thread> threads;
    for (int64_t i = n - 1; i >= 0; --i) threads.emplace_back(task, i, static_cast<int>(i % n_threads_));
    for (std::thread& t : threads) t.join();
  }
  int64_t n_task = 0;

 private:
  int n_threads_;
};

/// Tokens come in two prompts: the first makes transforms (its statistics end within the second if it is
/// short), both write pages.
void fill(KvLayer& layer, const Heads& s, const Tokens& tokens, int64_t first) {
  std::vector<float> q;
  for (int64_t t = 0; t < tokens.n(); ++t) {
    const auto row = random_query(s, static_cast<uint32_t>(t));
    q.insert(q.end(), row.begin(), row.end());
  }
  const int64_t width_q = s.shape.n_head * s.shape.head_dim;
  for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, first}, {first, tokens.n()}}) {
    layer.observe_queries(q.data() + from * width_q, to - from);
    ASSERT_TRUE(layer.append(tokens.key(from), tokens.value(from), to - from).ok());
  }
}

TEST(KltWorkers, ChangeNothingThatIsStored) {
  // Of one part, and of several: 12 heads of 64 do not fit one transform.
  for (const Heads& s : {Heads{6, 3, 32, 16}, Heads{12, 12, 64, 64}}) {
    const Tokens tokens(s, 2 * s.width() + 1100);
    for (const int64_t first : {300L, 2 * s.width() + 600L}) {
      const auto alone = make_cache(s, "klt"), shared = make_cache(s, "klt");
      Backwards workers(3);
      shared->use_workers(&workers);
      fill(alone->layer(kCompressed), s, tokens, first);
      fill(shared->layer(kCompressed), s, tokens, first);
      EXPECT_GT(workers.n_task, 3);
      const KltLayer &a = klt_layer(*alone), &b = klt_layer(*shared);
      ASSERT_EQ(a.n_page(), b.n_page());
      ASSERT_GT(a.n_page(), 12);
      const Decoded x(a), y(b);
      for (size_t i = 0; i < x.k.size(); ++i) {
        ASSERT_EQ(x.k[i], y.k[i]) << i;
        ASSERT_EQ(x.v[i], y.v[i]) << i;
      }
    }
  }
}

TEST(KltWorkers, TheFirstPageThatCannotBeStoredIsNamed) {
  const Heads s{6, 3, 32, 16};
  Tokens tokens(s, 1600);
  const auto basis = klt_basis_of(s, tokens.k.data(), tokens.v.data(), tokens.n());
  tokens.v[static_cast<size_t>(1400 * s.width())] = std::numeric_limits<float>::quiet_NaN();
  tokens.v[static_cast<size_t>(500 * s.width())] = std::numeric_limits<float>::infinity();
  Status status[2];
  for (int i = 0; i < 2; ++i) {
    const auto cache = make_cache(s, "klt");
    ASSERT_TRUE(klt_layer(*cache).use_basis(basis).ok());
    Backwards workers(4);
    if (i == 1) cache->use_workers(&workers);
    status[i] = klt_layer(*cache).append(tokens.key(0), tokens.value(0), tokens.n());
    EXPECT_EQ(klt_layer(*cache).n_tokens(), 0);
  }
  EXPECT_EQ(status[1].code(), StatusCode::non_finite);
  EXPECT_EQ(status[1].message(), status[0].message());
}

}  // namespace
}  // namespace narrows::test
