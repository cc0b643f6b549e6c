// Steps on real threads with a barrier between phases, as in ggml's graph: the same numbers as in turn and
// with any number of threads, bit for bit (one differing bit flips roundings of the next product and ends in
// another text), and nothing for ThreadSanitizer to report.
#include "kv/step/step_runner.h"

namespace narrows::test {
namespace {

class Concurrent : public testing::TestWithParam<const char*> {};

TEST_P(Concurrent, ThreadsGiveTheNumbersOfOneByOne) {
  const Heads s(6, 3, 32);
  const int64_t n = 570;  // crosses the conversion of SALS and klt at 512
  const Tokens tokens(s, n);
  std::vector<std::vector<float>> reference;  // of one thread
  for (const int n_threads : {1, 2, 3, 4}) {
    const auto a = make_cache(s, GetParam());
    const auto b = make_cache(s, GetParam());
    KvLayer& on_threads = a->layer(kCompressed);
    KvLayer& in_turn = b->layer(kCompressed);
    StepScratch scratch_a(s.shape, n_threads);
    StepScratch scratch_b(s.shape, n_threads);
    const int64_t prompt = 490;
    for (const auto* cache : {&a, &b}) {
      ASSERT_TRUE((*cache)->layer(kCompressed).append(tokens.key(0), tokens.value(0), prompt).ok());
    }
    for (int64_t t = prompt; t < n; ++t) {
      const auto q = random_query(s, static_cast<uint32_t>(t));
      const auto got = run_step(on_threads, scratch_a, tokens, t, q, Run::on_threads);
      const auto want = run_step(in_turn, scratch_b, tokens, t, q, Run::in_turn);
      ASSERT_EQ(got, want) << "token " << t << " threads " << n_threads;
      if (n_threads == 1) {
        reference.push_back(got);
        continue;
      }
      ASSERT_EQ(got, reference[static_cast<size_t>(t - prompt)]) << "token " << t << " threads " << n_threads;
    }
  }
}

// More threads than pages, blocks, heads or selected tokens: some have nothing to do.
TEST_P(Concurrent, IdleThreads) {
  const Heads s(2, 1, 32);
  const Tokens tokens(s, 20);
  const auto cache = make_cache(s, GetParam());
  KvLayer& layer = cache->layer(kCompressed);
  StepScratch scratch(s.shape, 4);
  for (int64_t t = 0; t < 20; ++t) {
    const auto q = random_query(s, static_cast<uint32_t>(t));
    const auto got = run_step(layer, scratch, tokens, t, q, Run::on_threads);
    std::vector<int64_t> all(static_cast<size_t>(t + 1));
    for (int64_t i = 0; i <= t; ++i) all[static_cast<size_t>(i)] = i;
    const auto want = attention(s, q, t, Decoded(layer), all);
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-5) << t;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Concurrent,
                         testing::Values("f16", "sals-25", "sals-12.5:budget=50", "sals-25:budget=all", "klt",
                                         "klt-10x:budget=50", "klt:budget=50,block=16", "klt:budget=all",
                                         "kivi-4", "kivi-2"));

}  // namespace
}  // namespace narrows::test
