// The products of a prompt in bfloat16 against sums in double over factors rounded the same way, for joined,
// reordered and mixed weights, every row count that changes the blocks, one thread and several.
#include "prefill/bf16_products.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "prefill/packed_products.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

double rounded(float x) { return static_cast<double>(ggml_bf16_to_fp32(ggml_fp32_to_bf16(x))); }

/// y [n, n_out] of x [n, n_in] by a weight of a loaded layer.
std::vector<float> multiply(Bf16Products& products, GraphRunner& runner, ggml_tensor* weight,
                            std::vector<float>& x, int64_t n) {
  ggml_context* ctx = ggml_init({ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true});
  ggml_tensor* in = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, weight->ne[0], n);
  in->data = x.data();
  ggml_tensor* out = products.multiply(ctx, weight, in);
  EXPECT_EQ(out->op, GGML_OP_CUSTOM) << "another product was taken";
  std::vector<float> y(static_cast<size_t>(weight->ne[1] * n));
  out->data = y.data();
  ggml_cgraph* graph = ggml_new_graph(ctx);
  ggml_build_forward_expand(graph, out);
  EXPECT_TRUE(runner.run(graph).ok());
  EXPECT_TRUE(products.status().ok());
  ggml_free(ctx);
  return y;
}

void check(const ModelWeights& weights, ggml_tensor* weight, const std::vector<float>& y,
           const std::vector<float>& x, int64_t n) {
  const int64_t n_in = weight->ne[0], n_out = weight->ne[1];
  std::vector<float> w(static_cast<size_t>(n_in * n_out));
  ASSERT_OK(weights.read_rows(weight, 0, n_out, w.data()));
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t o = 0; o < n_out; ++o) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < n_in; ++i) {
        const double term =
            rounded(x[static_cast<size_t>(r * n_in + i)]) * rounded(w[static_cast<size_t>(o * n_in + i)]);
        sum += term;
        size += std::fabs(term);
      }
      // n_in additions in float32.
      const double bound = std::ldexp(1.0, -24) * static_cast<double>(n_in + 1) * size;
      ASSERT_NEAR(static_cast<double>(y[static_cast<size_t>(r * n_out + o)]), sum, bound) << r << ", " << o;
    }
  }
}

std::vector<float> random_rows(int64_t n) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(random);
  return x;
}

TEST(Bf16Products, AreSumsOfRoundedFactors) {
  if (!Bf16Products::supported()) GTEST_SKIP() << "this CPU has no product of bfloat16";
  TinyModel neighbours;  // llama: rows of q and k change places
  neighbours.type = GGML_TYPE_Q8_0;
  TinyModel mixed;
  mixed.architecture = "qwen2";
  mixed.type = GGML_TYPE_Q4_1;
  mixed.types = {{"attn_v", GGML_TYPE_F16}, {"blk.1.ffn_up", GGML_TYPE_Q8_0}};
  for (const TinyModel& tiny : {neighbours, mixed}) {
    const LoadedTiny loaded(tiny);
    const ModelWeights& weights = loaded.model->weights();
    ASSERT_TRUE(Bf16Products::applies(weights));
    for (const int n_threads : {1, 3}) {
      GraphRunner runner(n_threads);
      PackedProducts otherwise(weights);
      auto products = Bf16Products::create(weights, runner, otherwise);
      ASSERT_TRUE(products.ok()) << products.status().message();
      for (int64_t layer = 0; layer < 2; ++layer) {
        ASSERT_OK((*products)->load(layer));
        const LayerWeights& w = weights.layer(layer);
        for (ggml_tensor* t : {w.wqkv, w.wq, w.wk, w.wv, w.wo, w.gate_up, w.gate, w.up, w.down}) {
          if (t == nullptr) continue;
          for (const int64_t n : {1, 5, 255, 257, 512, 600}) {
            std::vector<float> x = random_rows(n * t->ne[0]);
            check(weights, t, multiply(**products, runner, t, x, n), x, n);
          }
        }
      }
    }
  }
}

TEST(Bf16Products, LeaveFloatWeightsToGgml) {
  const LoadedTiny loaded{TinyModel()};
  EXPECT_FALSE(Bf16Products::applies(loaded.model->weights()));
}

TEST(Bf16Products, PromptsAreCloseToInt8) {
  if (!Bf16Products::supported()) GTEST_SKIP() << "this CPU has no product of bfloat16";
  TinyModel tiny;
  tiny.type = GGML_TYPE_F16;  // not packed: ggml's product, which rounds activations to half precision only
  const LoadedTiny loaded(tiny);
  const std::vector<Token> tokens = random_tokens(700);
  std::vector<std::vector<float>> logits;
  for (const PrefillProducts how :
       {PrefillProducts::int8, PrefillProducts::bf16, PrefillProducts::automatic}) {
    auto session = make_session(loaded.model, {.n_threads = 2, .prompt = {how, PrefillAttention::f32}});
    ASSERT_OK(session->prefill(tokens));
    logits.push_back(copy(session->logits()));
  }
  EXPECT_EQ(logits[1], logits[2]) << "auto is bf16 for a long prompt";
  EXPECT_NE(logits[0], logits[1]);
  EXPECT_LT(kl_divergence(logits[0], logits[1]), 1e-3);
}

}  // namespace
}  // namespace narrows::testing
