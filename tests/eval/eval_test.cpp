// eval's figures on a tiny model, against sums computed here from libllama's logits, and its refusals.
#include "eval/eval.h"

#include <gtest/gtest.h>

#include <cmath>

#include "calibrate/key_statistics.h"
#include "engine/session_impl.h"
#include "eval/mass_kept.h"
#include "peer/llama_peer.h"
#include "support/llama_reference.h"
#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

TinyModel four_layers() {
  TinyModel m;
  m.n_layer = 4;
  return m;
}

const LoadedTiny& tiny() {
  static const LoadedTiny loaded(four_layers());
  return loaded;
}

const std::vector<Token>& text() {
  static const std::vector<Token> all = random_tokens(900);
  return all;
}

EvalOptions options(int64_t context, int64_t tokens, const std::vector<std::string>& profiles) {
  EvalOptions o;
  o.context = context;
  o.tokens = tokens;
  for (const std::string& p : profiles) o.profiles.push_back(kv(p));
  o.n_threads = 1;
  return o;
}

std::vector<EvalRow> rows(const EvalOptions& o) {
  auto r = evaluate(tiny().model, text(), o);
  EXPECT_TRUE(r.ok()) << r.status().message();
  return r.ok() ? *r : std::vector<EvalRow>(o.profiles.size());
}

TEST(Eval, F16AgainstItselfIsNothing) {
  const EvalRow r = rows(options(200, 20, {"f16"}))[0];
  EXPECT_EQ(r.kv, "f16");
  EXPECT_EQ(r.kl_mean, 0);
  EXPECT_EQ(r.kl_p99, 0);
  EXPECT_EQ(r.top1, 1);
  EXPECT_EQ(r.mass_kept, 1);
  EXPECT_EQ(r.cache.n_tokens, 220);
}

TEST(Eval, AnAttentionIsJudgedAgainstFloat32) {
  EvalOptions o = options(400, 20, {"f16"});
  o.prompt.attention = PrefillAttention::f32;
  EXPECT_EQ(rows(o)[0].kl_mean, 0);
  for (const PrefillAttention how : {PrefillAttention::bf16_shift, PrefillAttention::pasa}) {
    o.prompt.attention = how;
    const EvalRow r = rows(o)[0];
    EXPECT_GT(r.kl_mean, 0) << attention_name(how);
    EXPECT_LT(r.kl_mean, 1e-3) << attention_name(how);
  }
}

TEST(Eval, PerplexityIsTheTextsOwn) {
  const int64_t context = 200, n = 60;
  const EvalRow r = rows(options(context, n, {"f16"}))[0];
  const LogitRows exact = llama_logits(tiny().path, std::span(text()).first(context + n), LlamaWay::exact);
  double log_prob = 0;
  for (int64_t i = context; i < context + n; ++i) {
    log_prob += log_softmax(exact.row(i))[static_cast<size_t>(text()[static_cast<size_t>(i + 1)])];
  }
  EXPECT_NEAR(std::log(r.ppl), -log_prob / static_cast<double>(n), 2e-3);  // f16 keys and values
  EXPECT_GT(r.ppl, 50);                                                    // the text is random
}

TEST(Eval, TheRowsOfLlamaShowParity) {
  EvalOptions o = options(200, 20, {"f16", "kivi-2"});
  o.with_llama_cpp = true;
  const auto all = rows(o);
  ASSERT_EQ(all.size(), 5U);
  const char* names[] = {"f16", "kivi-2", "llama.cpp f16 flash", "llama.cpp f16 plain",
                         "llama.cpp plain to flash"};
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(all[i].kv, names[i]);
  for (size_t i = 2; i < 5; ++i) {
    EXPECT_GT(all[i].kl_mean, 0);
    EXPECT_LT(all[i].kl_mean, 1e-4) << names[i];
    EXPECT_EQ(all[i].top1, 1);
    EXPECT_NEAR(all[i].ppl / all[0].ppl, 1, 5e-3);
    EXPECT_GT(all[1].kl_mean, 100 * all[i].kl_mean);
  }
}

TEST(Eval, CachesOfLlamaAreJudgedByItsOwnF16) {
  TinyModel m;
  m.head_dim = 32;  // a block of q8_0
  m.n_embd = 128;
  const LoadedTiny wide(m);
  EvalOptions o = options(200, 20, {"f16"});
  o.peer_kv = {"q8_0", "f16", "q4_0"};
  const auto all = evaluate(wide.model, text(), o);
  ASSERT_TRUE(all.ok()) << all.status().message();
  ASSERT_EQ(all->size(), 4U);
  const EvalRow &q8 = (*all)[1], &f16 = (*all)[2], &q4 = (*all)[3];
  EXPECT_EQ(q8.kv, "llama.cpp q8_0");
  EXPECT_EQ(f16.kv, "llama.cpp f16");
  EXPECT_EQ(q4.kv, "llama.cpp q4_0");
  EXPECT_EQ(q8.reference, "llama.cpp f16");
  EXPECT_EQ(f16.reference, "f16");
  EXPECT_LT(f16.kl_mean, 1e-4);
  EXPECT_GT(f16.kl_mean, 0);  // another engine
  EXPECT_GT(q8.kl_mean, 0);
  EXPECT_GT(q4.kl_mean, 5 * q8.kl_mean);
  // Own sums of one run.
  auto exact = LlamaPeer::create(wide.path, {220, 1}), kept = LlamaPeer::create(wide.path, {220, 1, "q4_0"});
  ASSERT_TRUE(exact.ok() && kept.ok());
  ASSERT_OK((*exact)->prefill(std::span(text()).first(200)));
  ASSERT_OK((*kept)->prefill(std::span(text()).first(200)));
  double sum = 0;
  for (size_t i = 0; i < 20; ++i) {
    ASSERT_OK((*exact)->decode(text()[200 + i]));
    ASSERT_OK((*kept)->decode(text()[200 + i]));
    sum += kl_divergence((*exact)->logits(), (*kept)->logits());
  }
  EXPECT_NEAR(q4.kl_mean, sum / 20, 1e-9);
  EXPECT_EQ(q4.cache.bytes, (*kept)->kv_bytes());
  // 18 bytes for 32 numbers instead of 64, and some bytes a token of its own.
  EXPECT_NEAR(q4.compression(), 64.0 / 18, 0.5);
  EXPECT_NEAR(q8.compression(), 64.0 / 34, 0.3);
  EXPECT_NEAR(f16.compression(), 1, 0.1);
  EXPECT_NEAR(q4.bytes_per_token(), q4.bytes_per_token_f16() / q4.compression(), 1e-6);
}

// The divergences of the single steps, out of runs of 1, 2, 3, ... steps over the same text.
TEST(Eval, MeanAndQuantileAreNumpys) {
  std::vector<double> kl;
  for (int64_t n = 1; n <= 6; ++n) {
    const EvalRow r = rows(options(100, n, {"kivi-2"}))[0];
    double before = 0;
    for (const double x : kl) before += x;
    kl.push_back(r.kl_mean * static_cast<double>(n) - before);
    EXPECT_GT(kl.back(), 0);
    std::vector<double> sorted = kl;
    std::sort(sorted.begin(), sorted.end());
    // numpy.quantile(x, .99): at index .99 (n - 1), linear between neighbours; below 100 values, between the
    // last two.
    const double last = sorted.back(), one_before = n > 1 ? sorted[static_cast<size_t>(n - 2)] : last;
    const double part = 0.99 * static_cast<double>(n - 1) - static_cast<double>(n - 2);
    const double want = n > 1 ? one_before + part * (last - one_before) : last;
    EXPECT_NEAR(r.kl_p99, want, 1e-9 * last) << n;
  }
  // Own sums of one run, step by step.
  auto f16 = make_session(tiny().model), kivi = make_session(tiny().model, {.kv = "kivi-2"});
  ASSERT_OK(
      Session::prefill_together(std::vector<Session*>{f16.get(), kivi.get()}, std::span(text()).first(100)));
  for (size_t i = 0; i < kl.size(); ++i) {
    ASSERT_OK(f16->decode(text()[100 + i]));
    ASSERT_OK(kivi->decode(text()[100 + i]));
    EXPECT_NEAR(kl[i], kl_divergence(f16->logits(), kivi->logits()), 1e-9);
  }
}

TEST(Eval, ManyProfilesAreAsManyRowsInOrder) {
  const std::vector<std::string> names = {
      "sals-12.5", "kivi-4", "sals-25:budget=30", "f16", "kivi-2", "sals-25:budget=all", "kivi-4"};
  const auto all = rows(options(600, 12, names));
  ASSERT_EQ(all.size(), names.size());
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_EQ(all[i].kv, names[i]);
    EXPECT_GT(all[i].ppl, 1);
    EXPECT_GE(all[i].kl_p99, all[i].kl_mean);
    EXPECT_GE(all[i].top1, 0);
    EXPECT_LE(all[i].top1, 1);
  }
  EXPECT_EQ(all[1].kl_mean, all[6].kl_mean);  // the same profile, the same cache
  EXPECT_EQ(all[3].kl_mean, 0);
  EXPECT_LT(all[1].kl_mean, all[4].kl_mean);
  // Alone it is the same.
  EXPECT_EQ(rows(options(600, 12, {"kivi-2"}))[0].kl_mean, all[4].kl_mean);
}

TEST(Eval, CompressionIsBytesOverBytes) {
  const auto all = rows(options(600, 12, {"f16", "kivi-4", "sals-25"}));
  for (const EvalRow& r : all) {
    const CacheStats& c = r.cache;
    EXPECT_EQ(c.n_tokens, 612);
    EXPECT_DOUBLE_EQ(r.compression(), static_cast<double>(c.bytes_f16) / static_cast<double>(c.bytes));
  }
  EXPECT_LE(all[0].compression(), 1);  // whole blocks
  EXPECT_GT(all[0].compression(), 0.9);
  EXPECT_EQ(all[0].compression_pages(), 1);  // there are none
  EXPECT_GT(all[1].compression(), 2);
  EXPECT_GT(all[1].compression_pages(), all[1].compression_layers());
  EXPECT_DOUBLE_EQ(all[2].compression_layers(),
                   static_cast<double>(all[2].cache.bytes_f16_compressed_layers) /
                       static_cast<double>(all[2].cache.bytes_compressed_layers));
  EXPECT_GT(all[2].compression_layers(), all[2].compression());  // three of four layers are dense
  // f16: [n_layer][keys and values][D] halves.
  const double layer = static_cast<double>(all[0].cache.bytes_f16) / 612 / 4;
  EXPECT_DOUBLE_EQ(all[0].bytes_per_token_f16(), 4 * layer);
  EXPECT_DOUBLE_EQ(all[0].bytes_per_token(), 4 * layer);
  EXPECT_DOUBLE_EQ(all[1].bytes_per_token(), 4 * layer / all[1].compression_pages());
  EXPECT_DOUBLE_EQ(all[2].bytes_per_token(), 3 * layer + layer / all[2].compression_pages());
}

// --- mass kept
// ----------------------------------------------------------------------------------------------------

TEST(MassKept, GrowsWithTheBudgetToOne) {
  const auto all = rows(options(
      700, 8,
      {"sals-25:budget=5", "sals-25:budget=50", "sals-25:budget=300", "sals-25:budget=all", "kivi-2"}));
  EXPECT_GT(all[0].mass_kept, 0);
  EXPECT_LT(all[0].mass_kept, all[1].mass_kept);
  EXPECT_LT(all[1].mass_kept, all[2].mass_kept);
  EXPECT_LT(all[2].mass_kept, 1);
  EXPECT_EQ(all[3].mass_kept, 1);
  EXPECT_EQ(all[4].mass_kept, 1);
}

/// RoPE by neighbours or halves is one and the same for a dot product of rows in the same order: halves, as
/// in memory.
void rotate(double* x, int64_t d, int64_t pos) {
  for (int64_t i = 0; i < d / 2; ++i) {
    const double angle =
        static_cast<double>(pos) * std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(d));
    const double a = x[i], b = x[i + d / 2];
    x[i] = a * std::cos(angle) - b * std::sin(angle);
    x[i + d / 2] = a * std::sin(angle) + b * std::cos(angle);
  }
}

TEST(MassKept, IsTheShareOfTheExactSoftmax) {
  const int64_t context = 700, d = 16, width = 32, layer = 2;
  auto reference = make_session(tiny().model),
       session = make_session(tiny().model, {.kv = "sals-25:budget=40"});
  ASSERT_OK(Session::prefill_together(std::vector<Session*>{reference.get(), session.get()},
                                      std::span(text()).first(context)));
  const ExactKeys keys(Access::impl(*reference));
  EXPECT_EQ(keys.n_context(), context);
  MassKept mass(keys, Access::impl(*session));
  EXPECT_EQ(mass.mean(), 1);  // nothing was seen yet

  std::vector<float> k(static_cast<size_t>(context * width)), v(k.size());
  Access::impl(*reference).cache->layer(layer).read(0, context, k.data(), v.data());
  std::vector<std::vector<double>> exact;
  for (int64_t t = 0; t < context; ++t)
    exact.emplace_back(k.begin() + t * width, k.begin() + (t + 1) * width);
  double sum = 0;
  int count = 0;
  for (int64_t t = context; t < context + 3; ++t) {
    ASSERT_OK(session->decode(text()[static_cast<size_t>(t)]));
    mass.observe();
    const std::vector<float>& step_q = mass.step_q(layer);
    exact.emplace_back(mass.step_k(layer).begin(), mass.step_k(layer).end());
    for (int64_t h = 0; h < 2; ++h) rotate(exact.back().data() + h * d, d, t);
    const auto selected = Access::impl(*session).cache->layer(static_cast<int64_t>(layer)).last_selection(0);
    ASSERT_TRUE(selected.has_value());
    ASSERT_EQ(selected->size(), 40U);
    const int64_t in_pages = Access::impl(*session).cache->layer(layer).bytes().n_tokens_in_pages;
    for (int64_t h = 0; h < 4; ++h) {
      std::vector<double> q(step_q.begin() + h * d, step_q.begin() + (h + 1) * d);
      rotate(q.data(), d, t);
      double all = 0, kept = 0;
      for (int64_t i = 0; i <= t; ++i) {
        double dot = 0;
        for (int64_t c = 0; c < d; ++c)
          dot +=
              q[static_cast<size_t>(c)] * exact[static_cast<size_t>(i)][static_cast<size_t>(h / 2 * d + c)];
        const double p = std::exp(dot / 4);
        const bool chosen = std::find(selected->begin(), selected->end(), i) != selected->end();
        all += p;
        kept += i < 16 || i >= 16 + in_pages || chosen ? p : 0;
      }
      sum += kept / all;
      ++count;
    }
  }
  EXPECT_NEAR(mass.mean(), sum / count, 1e-5);
  EXPECT_LT(mass.mean(), 0.95);
}

// --- refusals
// -----------------------------------------------------------------------------------------------------

TEST(EvalRefusals, ATextThatIsTooShort) {
  expect_refusal(status_of(evaluate(tiny().model, text(), options(800, 100, {"f16"}))),
                 StatusCode::invalid_argument, {"900", "901", "800", "100"});
  EXPECT_TRUE(evaluate(tiny().model, text(), options(879, 20, {"f16"})).ok());  // 900 exactly
  expect_refusal(status_of(evaluate(tiny().model, {}, options(1, 1, {"f16"}))), StatusCode::invalid_argument,
                 {"0 tokens", "3"});
  for (const auto& [context, tokens] : {std::pair{0, 5}, {5, 0}, {-1, 5}, {5, -3}}) {
    expect_refusal(status_of(evaluate(tiny().model, text(), options(context, tokens, {"f16"}))),
                   StatusCode::invalid_argument, {"at least 1"});
  }
}

TEST(EvalRefusals, MoreThanTheModelsContext) {
  const auto longer = random_tokens(2100);
  expect_refusal(status_of(evaluate(tiny().model, longer, options(2040, 20, {"f16"}))),
                 StatusCode::invalid_argument, {"2060", "2048"});
}

TEST(EvalRefusals, LogitsThatAreNoNumbers) {
  TinyModel m = four_layers();  // behind all keys and values, so that the cache does not see it
  m.edit_tensors = [](std::vector<TinyTensor>& all) {
    tensor(all, "output_norm.weight").data[1] = std::nanf("");
  };
  const LoadedTiny bad(m);
  expect_refusal(status_of(evaluate(bad.model, text(), options(20, 3, {"kivi-4"}))), StatusCode::non_finite,
                 {"f16"});
}

TEST(EvalRefusals, ABasisOfAnotherModelAndOnlyWhereItIsUsed) {
  TinyModel m = four_layers();
  m.seed = 5;
  const LoadedTiny other(m);
  const auto basis = calibrate(*other.model, random_tokens(200), "x", 1);
  ASSERT_TRUE(basis.ok());
  const TempDir dir;
  ASSERT_OK(write_basis_file(dir.path("b.gguf"), *basis, other.model->info()));
  EvalOptions o = options(100, 3, {"kivi-4"});
  o.basis_path = dir.path("b.gguf");
  EXPECT_TRUE(evaluate(tiny().model, text(), o).ok());
  o.profiles.push_back(kv("sals-25"));
  expect_refusal(status_of(evaluate(tiny().model, text(), o)), StatusCode::invalid_file, {"b.gguf"});
}

TEST(EvalProgress, GrowsToOneAndCancels) {
  std::vector<double> seen;
  ASSERT_TRUE(evaluate(tiny().model, text(), options(100, 5, {"f16"}), [&](double done) {
                seen.push_back(done);
                return true;
              }).ok());
  EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
  EXPECT_EQ(seen.back(), 1);
  for (const double limit : {0.0, 0.3, 0.8}) {
    const auto stopped =
        evaluate(tiny().model, text(), options(100, 5, {"f16"}), [&](double done) { return done < limit; });
    EXPECT_EQ(static_cast<int>(stopped.status().code()), static_cast<int>(StatusCode::cancelled)) << limit;
  }
}

}  // namespace
}  // namespace narrows::testing
