// The measurement loop on a tiny model: rows, their order and figures that must hold whatever the speed; its
// refusals.
#include "bench/bench.h"

#include <gtest/gtest.h>

#include "support/refusal.h"
#include "support/sanitized.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

const LoadedTiny& tiny() {
  TinyModel model;
  model.n_layer = 4;    // SALS keeps layers 0, 1 and the last exact
  model.head_dim = 32;  // a group of q8_0
  static const LoadedTiny loaded{model};
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
  o.peer_kv = {"f16", "q8_0"};
  const auto report = run_bench(tiny().model, random_tokens(100 + 4 * 4 + 1), o, go_on);
  ASSERT_TRUE(report.ok()) << report.status().message();
  const std::vector<BenchRow>& rows = report->rows;
  ASSERT_EQ(rows.size(), 8U);
  const char* const kv[] = {"f16", "kivi-4", "f16", "q8_0"};
  for (size_t i = 0; i < rows.size(); ++i) {
    const BenchRow& r = rows[i];
    const bool ours = i % 4 < 2;
    EXPECT_EQ(r.context, i < 4 ? 0 : 100);
    EXPECT_EQ(r.engine, ours ? "narrows" : "llama.cpp");
    EXPECT_EQ(r.kv, kv[i % 4]);
    EXPECT_GT(r.decode.median, 0);
    EXPECT_LE(r.decode.min, r.decode.median);
    EXPECT_LE(r.decode.median, r.decode.max);
    EXPECT_GT(r.decode.share, 0);
    EXPECT_EQ(r.prefill.median > 0, r.context > 0);
    EXPECT_EQ(r.prefill.share > 0, r.context > 0);
    EXPECT_EQ(r.decode.vs_peer > 0, ours);
    EXPECT_EQ(r.prefill.vs_peer > 0, ours && r.context > 0);
    EXPECT_EQ(r.step.has_value(), ours);
    EXPECT_GT(r.kv_bytes, 0);
    EXPECT_GT(r.peak_rss_bytes, 1 << 20);
  }
  EXPECT_LT(rows[5].kv_bytes, rows[4].kv_bytes);  // at 116 tokens
  EXPECT_LT(rows[7].kv_bytes, rows[6].kv_bytes);
}

TEST(Bench, StagesOfAStepAddUpToIt) {
  BenchOptions o = options();
  o.contexts = {600};
  o.profiles = {kv("f16"), kv("klt:budget=32"), kv("sals-25:budget=32")};
  const auto report = run_bench(tiny().model, random_tokens(600 + 4 * 4 + 1), o, go_on);
  ASSERT_TRUE(report.ok()) << report.status().message();
  for (const BenchRow& r : report->rows) {
    ASSERT_TRUE(r.step.has_value());
    const StepMs& s = *r.step;
    EXPECT_GT(s.products, 0);
    EXPECT_GT(s.attend, 0);
    EXPECT_GT(s.rest, 0);
    EXPECT_EQ(s.score > 0, r.kv != "f16") << r.kv;
    EXPECT_EQ(s.select > 0, r.kv != "f16") << r.kv;
    EXPECT_EQ(s.rebuild > 0, r.kv != "f16") << r.kv;
    const double all = s.total();
    EXPECT_GE(all, 0.999 * 1e3 / r.decode.max) << r.kv;  // it is the mean of the rounds
    EXPECT_LE(all, 1.001 * 1e3 / r.decode.min) << r.kv;
  }
}

TEST(Bench, PrefillsAreRepeatedOnAnEmptyCache) {
  BenchOptions o = options();
  o.contexts = {100};
  const auto text = random_tokens(100 + 4 * 4 + 1);
  const auto once = run_bench(tiny().model, text, o, go_on);
  o.prefill_rounds = 3;
  o.with_llama_cpp = true;
  int prefills = 0;
  const auto thrice = run_bench(tiny().model, text, o, [&](const std::string& what) {
    prefills += what.find("prefill of 100 tokens") != std::string::npos ? 1 : 0;
    return true;
  });
  ASSERT_TRUE(once.ok() && thrice.ok()) << thrice.status().message();
  EXPECT_EQ(prefills, 6);
  EXPECT_EQ(once->rows[1].kv_bytes, thrice->rows[1].kv_bytes);
  const BenchSpeed& prefill = thrice->rows[0].prefill;
  EXPECT_LT(prefill.min, prefill.max);
  EXPECT_LE(prefill.min, prefill.median);
  EXPECT_LE(prefill.median, prefill.max);
}

TEST(Bench, RefusesWhatCannotBeMeasured) {
  const auto text = random_tokens(200);
  const auto refused = [&](const BenchOptions& o, const std::vector<std::string>& words) {
    expect_refusal(status_of(run_bench(tiny().model, text, o, go_on)), StatusCode::invalid_argument, words);
  };
  for (const auto& change : std::vector<std::function<void(BenchOptions&)>>{
           [](BenchOptions& o) { o.contexts.clear(); }, [](BenchOptions& o) { o.profiles.clear(); },
           [](BenchOptions& o) { o.rounds = 0; }, [](BenchOptions& o) { o.tokens = 0; },
           [](BenchOptions& o) { o.tokens = -4; }, [](BenchOptions& o) { o.prefill_rounds = 0; },
           [](BenchOptions& o) { o.with_llama_cpp = true, o.peer_kv.clear(); }}) {
    BenchOptions o = options();
    change(o);
    refused(o, {"at least one"});
  }
  BenchOptions odd = options();
  odd.peer_kv = {"f16", "q9_0"};
  refused(odd, {"q9_0", "q8_0"});
  BenchOptions deep = options();
  deep.contexts = {0, 190};
  refused(deep, {"200", "190", "207"});
  deep.contexts = {183};
  EXPECT_TRUE(run_bench(tiny().model, text, deep, go_on).ok());
}

TEST(Bench, CanBeStopped) {
  for (const int allowed : thinned<int>({0, 1, 2, 3, 4, 5})) {
    int left = allowed;
    const auto rows = run_bench(tiny().model, random_tokens(200), options(),
                                [&](const std::string&) { return left-- > 0; });
    EXPECT_EQ(static_cast<int>(rows.status().code()), static_cast<int>(StatusCode::cancelled));
  }
}

}  // namespace
}  // namespace narrows::testing
