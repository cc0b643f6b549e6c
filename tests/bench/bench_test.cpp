// The measurement loop on a tiny model: rows, their order and figures that must hold whatever the speed; its
// refusals.
#include "bench/bench.h"

#include <gtest/gtest.h>

#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

const LoadedTiny& tiny() {
  static const LoadedTiny loaded{TinyModel()};
  return loaded;
}

BenchOptions options() {
  BenchOptions o;
  o.contexts = {0, 100};
  o.profiles = {kv("f16"), kv("kivi-4")};
  o.n_threads = 1;
  o.rounds = 3;
  o.tokens = 4;
  return o;
}

bool go_on(const std::string&) { return true; }

TEST(Bench, MeasuresEveryEngineProfileAndDepth) {
  BenchOptions o = options();
  o.with_llama_cpp = true;
  const auto rows = run_bench(tiny().model, random_tokens(100 + 4 * 4 + 1), o, go_on);
  ASSERT_TRUE(rows.ok()) << rows.status().message();
  ASSERT_EQ(rows->size(), 6U);
  for (size_t i = 0; i < rows->size(); ++i) {
    const BenchRow& r = (*rows)[i];
    EXPECT_EQ(r.context, i < 3 ? 0 : 100);
    EXPECT_EQ(r.engine, i % 3 == 2 ? "llama.cpp" : "narrows");
    EXPECT_EQ(r.kv, i % 3 == 1 ? "kivi-4" : "f16");
    EXPECT_GT(r.decode_tok_s, 0);
    EXPECT_LE(r.decode_tok_s_min, r.decode_tok_s);
    EXPECT_LE(r.decode_tok_s, r.decode_tok_s_max);
    EXPECT_EQ(r.prefill_tok_s > 0, r.context > 0);
    EXPECT_EQ(r.decode_vs_peer > 0, r.engine == "narrows");
    EXPECT_GT(r.kv_bytes, 0);
    EXPECT_GT(r.peak_rss_bytes, 1 << 20);
  }
  EXPECT_LT((*rows)[4].kv_bytes, (*rows)[3].kv_bytes);  // kivi-4 at 116 tokens
}

TEST(Bench, RefusesWhatCannotBeMeasured) {
  const auto text = random_tokens(200);
  const auto refused = [&](const BenchOptions& o, const std::vector<std::string>& words) {
    expect_refusal(status_of(run_bench(tiny().model, text, o, go_on)), StatusCode::invalid_argument, words);
  };
  for (const auto& change : std::vector<std::function<void(BenchOptions&)>>{
           [](BenchOptions& o) { o.contexts.clear(); }, [](BenchOptions& o) { o.profiles.clear(); },
           [](BenchOptions& o) { o.rounds = 0; }, [](BenchOptions& o) { o.tokens = 0; },
           [](BenchOptions& o) { o.tokens = -4; }}) {
    BenchOptions o = options();
    change(o);
    refused(o, {"at least one"});
  }
  BenchOptions deep = options();
  deep.contexts = {0, 190};
  refused(deep, {"200", "190", "207"});
  deep.contexts = {183};
  EXPECT_TRUE(run_bench(tiny().model, text, deep, go_on).ok());
}

TEST(Bench, CanBeStopped) {
  for (int allowed = 0; allowed < 5; ++allowed) {
    int left = allowed;
    const auto rows = run_bench(tiny().model, random_tokens(200), options(),
                                [&](const std::string&) { return left-- > 0; });
    EXPECT_EQ(static_cast<int>(rows.status().code()), static_cast<int>(StatusCode::cancelled));
  }
}

}  // namespace
}  // namespace narrows::testing
