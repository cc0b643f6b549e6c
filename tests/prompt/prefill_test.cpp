// Prompts of every awkward length, in one part and in several, against libllama's exact path; and what
// Prefill promises its hooks: order of layers, keys before RoPE, values, errors with the layer's number,
// progress, cancelling.
#include "prompt/prefill.h"

#include <gtest/gtest.h>

#include <memory>

#include "engine/session_impl.h"
#include "kernels/ops.h"
#include "support/llama_reference.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

constexpr int64_t kLongest = 1100;  ///< two chunks of 512 and a part, 8 tiles of 128 and a part

TinyModel qwen2() {
  TinyModel m;
  m.architecture = "qwen2";
  m.n_layer = 3;
  return m;
}

/// One model, its tokens and libllama's exact logits for all lengths.
struct Long {
  LoadedTiny tiny{qwen2()};
  std::vector<Token> tokens = random_tokens(kLongest);
  LogitRows exact = llama_logits(tiny.path, tokens, LlamaWay::exact);
  LogitRows f16 = llama_logits(tiny.path, tokens, LlamaWay::f16_plain);

  std::span<const Token> part(int64_t from, int64_t to) const {
    return std::span(tokens).subspan(static_cast<size_t>(from), static_cast<size_t>(to - from));
  }
  /// See tests/engine/parity_test.cpp.
  static double float_tolerance(int64_t n) {
    return std::ldexp(1.0, -24) * static_cast<double>(16 + n) * 4 * 2.7;
  }
  /// What an f16 cache costs libllama at its worst over all these rows: the most that ours may cost.
  double f16_tolerance() const {
    double worst = 0;
    for (int64_t i = 0; i < kLongest; ++i) worst = std::max(worst, max_difference(exact.row(i), f16.row(i)));
    return worst;
  }
};

const Long& fixture() {
  static const Long all;
  return all;
}

class Lengths : public ::testing::TestWithParam<int64_t> {};

TEST_P(Lengths, OnePartIsExact) {
  const int64_t n = GetParam();
  for (const int n_threads : {1, 3}) {
    auto session = make_session(fixture().tiny.model, {.n_threads = n_threads});
    ASSERT_OK(session->prefill(fixture().part(0, n)));
    EXPECT_EQ(session->n_past(), n);
    EXPECT_LT(max_difference(fixture().exact.row(n - 1), session->logits()), Long::float_tolerance(n))
        << n_threads << " threads";
  }
}

// The second part attends to keys and values that were rounded to f16 meanwhile.
TEST_P(Lengths, TwoPartsAreOneWithinF16) {
  const int64_t n = GetParam();
  for (const int64_t first : {int64_t{1}, n / 2, n - 1}) {
    if (first < 1 || first >= n) continue;
    auto session = make_session(fixture().tiny.model);
    ASSERT_OK(session->prefill(fixture().part(0, first)));
    EXPECT_LT(max_difference(fixture().exact.row(first - 1), session->logits()),
              Long::float_tolerance(first));
    ASSERT_OK(session->prefill(fixture().part(first, n)));
    EXPECT_EQ(session->n_past(), n);
    EXPECT_LT(max_difference(fixture().exact.row(n - 1), session->logits()), fixture().f16_tolerance())
        << first << " first";
  }
}

INSTANTIATE_TEST_SUITE_P(AroundTilesAndChunks, Lengths,
                         ::testing::Values(1, 2, 63, 64, 65, 127, 129, 511, 512, 513, 575, 1023, 1025,
                                           kLongest));

TEST(Parts, ManyOddParts) {
  auto session = make_session(fixture().tiny.model);
  int64_t at = 0;
  for (const int64_t n : {1, 62, 2, 3, 60, 1, 300, 1, 82, 513, 64}) {
    ASSERT_OK(session->prefill(fixture().part(at, at + n)));
    at += n;
    ASSERT_LT(max_difference(fixture().exact.row(at - 1), session->logits()), fixture().f16_tolerance())
        << at;
  }
}

TEST(Parts, StepsAndPromptsInTurn) {
  auto session = make_session(fixture().tiny.model);
  ASSERT_OK(session->prefill(fixture().part(0, 70)));
  for (int64_t at = 70; at < 600;) {
    for (int i = 0; i < 5; ++i) {
      ASSERT_OK(session->decode(fixture().tokens[static_cast<size_t>(at)]));
      ASSERT_LT(max_difference(fixture().exact.row(at), session->logits()), fixture().f16_tolerance()) << at;
      ++at;
    }
    ASSERT_OK(session->prefill(fixture().part(at, at + 101)));
    at += 101;
    ASSERT_LT(max_difference(fixture().exact.row(at - 1), session->logits()), fixture().f16_tolerance())
        << at;
  }
}

TEST(Parts, StepsAloneAreAPrompt) {
  auto session = make_session(fixture().tiny.model);
  for (int64_t i = 0; i < 140; ++i) {
    ASSERT_OK(session->decode(fixture().tokens[static_cast<size_t>(i)]));
    ASSERT_LT(max_difference(fixture().exact.row(i), session->logits()), fixture().f16_tolerance()) << i;
  }
}

// The tolerances above would be worth nothing if they let a missing token pass.
TEST(Parts, AMissingTokenIsSeen) {
  auto session = make_session(fixture().tiny.model);
  ASSERT_OK(session->prefill(fixture().part(1, kLongest)));
  EXPECT_GT(max_difference(fixture().exact.row(kLongest - 1), session->logits()),
            5 * fixture().f16_tolerance());
}

// --- Prefill and its hooks
// ----------------------------------------------------------------------------------------

ExecutorLease lease(const ModelParts& parts) {
  auto taken = ExecutorLease::take(parts.executors, 1);
  EXPECT_TRUE(taken.ok());
  return std::move(*taken);
}

struct Runner {
  const ModelParts& parts;
  std::vector<kernels::RopeTable> ropes;
  ExecutorLease executor;
  Prefill prefill;
  std::vector<float> logits;

  explicit Runner(const Model& model)
      : parts(parts_of(model)),
        ropes{{parts.spec().ropes.front(), 2048}},
        executor(lease(parts)),
        prefill(*parts.weights, parts.plan, ropes, *executor, {.attention = PrefillAttention::f32}),
        logits(static_cast<size_t>(parts.spec().n_vocab)) {}
};

/// Keys before RoPE and values of layer 0 in double: the norm, the weight, the bias.
std::vector<double> first_layer_row(const TinyModel& m, Token token, const std::string& which) {
  std::vector<TinyTensor> all = m.tensors();
  const float* x = tensor(all, "token_embd.weight").data.data() + token * m.n_embd;
  double square = 0;
  for (int64_t i = 0; i < m.n_embd; ++i) square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double scale = 1 / std::sqrt(square / static_cast<double>(m.n_embd) + 1e-5);
  const std::vector<float>& norm = tensor(all, "blk.0.attn_norm.weight").data;
  const std::vector<float>& w = tensor(all, "blk.0." + which + ".weight").data;
  const std::vector<float>& bias = tensor(all, "blk.0." + which + ".bias").data;
  std::vector<double> out;
  for (int64_t r = 0; r < m.width(); ++r) {
    double sum = static_cast<double>(bias[static_cast<size_t>(r)]);
    for (int64_t i = 0; i < m.n_embd; ++i) {
      sum += static_cast<double>(w[static_cast<size_t>(r * m.n_embd + i)]) * static_cast<double>(x[i]) *
             scale * static_cast<double>(norm[static_cast<size_t>(i)]);
    }
    out.push_back(sum);
  }
  return out;
}

TEST(Hooks, GetEveryLayerOnceInOrderWithPlainKeysAndValues) {
  Runner r(*fixture().tiny.model);
  const int64_t n = 600, width = qwen2().width();
  std::vector<int64_t> layers;
  PrefillHooks hooks;
  hooks.read_past = [](int64_t, int64_t, int64_t, float*, float*) { FAIL() << "there is no past"; };
  hooks.layer_done = [&](int64_t layer, const float* k, const float* v, int64_t rows) -> Status {
    layers.push_back(layer);
    EXPECT_EQ(rows, n);
    if (layer > 0) return {};
    for (const int64_t t : {int64_t{0}, int64_t{1}, int64_t{511}, int64_t{512}, n - 1}) {
      const Token token = fixture().tokens[static_cast<size_t>(t)];
      const auto key = first_layer_row(qwen2(), token, "attn_k"),
                 value = first_layer_row(qwen2(), token, "attn_v");
      for (int64_t c = 0; c < width; ++c) {
        EXPECT_NEAR(static_cast<double>(k[t * width + c]), key[static_cast<size_t>(c)], 2e-5)
            << t << " " << c;
        EXPECT_NEAR(static_cast<double>(v[t * width + c]), value[static_cast<size_t>(c)], 2e-5)
            << t << " " << c;
      }
    }
    return {};
  };
  ASSERT_OK(r.prefill.run(fixture().part(0, n), 0, hooks, {}, r.logits.data()));
  EXPECT_EQ(layers, (std::vector<int64_t>{0, 1, 2}));
  EXPECT_LT(max_difference(fixture().exact.row(n - 1), r.logits), Long::float_tolerance(n));
}

TEST(Hooks, ReadThePastOfEveryLayerWholeAndOnce) {
  // The past comes from a session; the hook counts what is asked for.
  auto session = make_session(fixture().tiny.model);
  const int64_t n_past = 130, n = 90;
  ASSERT_OK(session->prefill(fixture().part(0, n_past)));
  Runner r(*fixture().tiny.model);
  std::vector<std::vector<int>> asked(3, std::vector<int>(static_cast<size_t>(n_past)));
  PrefillHooks hooks;
  hooks.read_past = [&](int64_t layer, int64_t first, int64_t count, float* k, float* v) {
    ASSERT_LE(first + count, n_past);
    for (int64_t i = first; i < first + count; ++i)
      ++asked[static_cast<size_t>(layer)][static_cast<size_t>(i)];
    Access::impl(*session).cache->layer(layer).read(first, count, k, v);
  };
  hooks.layer_done = [&](int64_t, const float*, const float*, int64_t rows) -> Status {
    EXPECT_EQ(rows, n);  // the new tokens alone
    return {};
  };
  ASSERT_OK(r.prefill.run(fixture().part(n_past, n_past + n), n_past, hooks, {}, r.logits.data()));
  for (const auto& layer : asked) EXPECT_EQ(layer, std::vector<int>(static_cast<size_t>(n_past), 1));
  EXPECT_LT(max_difference(fixture().exact.row(n_past + n - 1), r.logits), fixture().f16_tolerance());
}

TEST(Hooks, AnErrorComesBackWithTheLayer) {
  Runner r(*fixture().tiny.model);
  int calls = 0;
  PrefillHooks hooks;
  hooks.layer_done = [&](int64_t layer, const float*, const float*, int64_t) -> Status {
    ++calls;
    return layer == 1 ? Status(StatusCode::out_of_memory, "no room") : Status();
  };
  const Status s = r.prefill.run(fixture().part(0, 10), 0, hooks, {}, r.logits.data());
  EXPECT_EQ(s.code(), StatusCode::out_of_memory);
  EXPECT_EQ(s.message(), "layer 1: no room");
  EXPECT_EQ(calls, 2);
}

TEST(Hooks, TokensOutsideTheVocabularyAreRefusedBeforeAnyLayer) {
  Runner r(*fixture().tiny.model);
  PrefillHooks hooks;
  hooks.layer_done = [](int64_t, const float*, const float*, int64_t) -> Status {
    ADD_FAILURE() << "a layer ran";
    return {};
  };
  for (const Token bad : {-1, static_cast<Token>(kTinyVocab), 1 << 30}) {
    const std::vector<Token> tokens = {1, 2, bad};
    const Status s = r.prefill.run(tokens, 0, hooks, {}, r.logits.data());
    EXPECT_EQ(s.code(), StatusCode::invalid_argument);
    EXPECT_NE(s.message().find(std::to_string(bad)), std::string::npos) << s.message();
    EXPECT_NE(s.message().find("258"), std::string::npos) << s.message();
  }
}

TEST(Progress, GrowsFromZeroToOne) {
  auto session = make_session(fixture().tiny.model);
  std::vector<double> seen;
  ASSERT_OK(session->prefill(fixture().part(0, kLongest), [&](double done) {
    seen.push_back(done);
    return true;
  }));
  ASSERT_GE(seen.size(), 9U);  // three layers of three chunks
  EXPECT_EQ(seen.front(), 0);
  EXPECT_EQ(seen.back(), 1);
  EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
}

TEST(Memory, NeedGrowsWithTokensAndCoversTheBuffers) {
  const ModelParts& parts = parts_of(*fixture().tiny.model);
  const ModelInfo& hp = fixture().tiny.model->info();
  const auto needed = [&](int64_t n, int64_t n_past) {
    return Prefill::bytes_needed(parts.spec(), parts.plan, n, n_past, 1,
                                 {PrefillProducts::int8, PrefillAttention::f32});
  };
  int64_t before = 0;
  for (const int64_t n : {1, 64, 512, 513, 4096, 100000}) {
    const int64_t need = needed(n, 0);
    EXPECT_GT(need, before);
    // The residual stream, raw keys, rotated keys and values.
    EXPECT_GE(need, n * (hp.n_embd + 3 * hp.n_head_kv * hp.head_dim) * 4);
    // The past's keys and values, but for what fits the tile that was begun.
    EXPECT_GE(needed(n, 1000), need + (1000 - kernels::kPrefillTile) * 2 * hp.n_head_kv * hp.head_dim * 4);
    before = need;
  }
}

}  // namespace
}  // namespace narrows::testing
