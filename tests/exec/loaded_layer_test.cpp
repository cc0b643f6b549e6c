// The products of a long prompt against sums in double over factors rounded the same way, for joined,
// reordered and mixed weights, every row count that changes the blocks, one thread and several.
#include "exec/cpu/loaded_layer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "base/thread_pool.h"
#include "engine/model_parts.h"
#include "exec/random_rows.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

/// y [n, n_out] of x [n, n_in] by a weight of a loaded layer, in blocks as threads would take them.
std::vector<float> multiply(LoadedLayer& layer, const Matrix& w, const std::vector<float>& x, int64_t n) {
  const int64_t block = std::min(n, LoadedLayer::kBlock);
  EXPECT_OK(layer.prepare(block, n % block));
  std::vector<float> y(static_cast<size_t>(w.n_out * n));
  for (int64_t r = 0; r < n; r += block)
    EXPECT_OK(layer.multiply(w, x.data() + r * w.n_in, std::min(block, n - r), y.data() + r * w.n_out, 0));
  return y;
}

void check(const Matrix& weight, const std::vector<float>& y, const std::vector<float>& x, int64_t n) {
  const int64_t n_in = weight.n_in, n_out = weight.n_out;
  const auto rounded = [&](std::span<const float> all) {
    const bool whole = weight.type == TensorType::f32 || !LoadedLayer::has_bf16();
    std::vector<double> out;
    for (const float v : all)
      out.push_back(static_cast<double>(whole ? v : ggml_bf16_to_fp32(ggml_fp32_to_bf16(v))));
    return out;
  };
  std::vector<float> w(static_cast<size_t>(n_in * n_out));
  weight.unpack(0, n_out, w.data());
  const std::vector<double> ws = rounded(w), xs = rounded(x);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t o = 0; o < n_out; ++o) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < n_in; ++i) {
        const double term = xs[static_cast<size_t>(r * n_in + i)] * ws[static_cast<size_t>(o * n_in + i)];
        sum += term;
        size += std::fabs(term);
      }
      // n_in additions in float32.
      const double bound = std::ldexp(1.0, -24) * static_cast<double>(n_in + 1) * size;
      ASSERT_NEAR(static_cast<double>(y[static_cast<size_t>(r * n_out + o)]), sum, bound) << r << ", " << o;
    }
  }
}

TEST(LoadedLayer, GivesSumsOfRoundedFactors) {
  TinyModel neighbours;  // llama: rows of q and k change places
  neighbours.type = GGML_TYPE_Q8_0;
  TinyModel mixed;
  mixed.architecture = "qwen2";
  mixed.type = GGML_TYPE_Q4_1;
  mixed.types = {{"attn_v", GGML_TYPE_F16}, {"blk.1.ffn_up", GGML_TYPE_Q8_0}, {"ffn_down", GGML_TYPE_F32}};
  TinyModel wide;  // more outputs than a task unpacks, and no multiple of what a layout blocks
  wide.n_ff = 424;
  TinyModel rare;
  rare.type = GGML_TYPE_Q3_K;
  rare.n_embd = rare.n_ff = 256;
  rare.head_dim = 64;
  int n_checked = 0;
  for (const TinyModel& tiny : {neighbours, mixed, wide, rare}) {
    const LoadedTiny loaded(tiny);
    const ModelParts& parts = parts_of(*loaded.model);
    if (!LoadedLayer::supports(parts.plan.layers[0])) continue;
    for (const int n_threads : {1, 3}) {
      auto pool = ThreadPool::create(n_threads);
      ASSERT_TRUE(pool.ok());
      auto made = LoadedLayer::create(**pool);
      ASSERT_TRUE(made.ok()) << made.status().message();
      for (size_t layer = 0; layer < 2; ++layer) {
        ASSERT_OK((*made)->load(parts.plan.layers[layer]));
        EXPECT_TRUE((*made)->holds(parts.plan.layers[layer]));
        EXPECT_FALSE((*made)->holds(parts.plan.layers[1 - layer]));
        for (const Matrix* w : parts.weights->layer(static_cast<int64_t>(layer)).matrices()) {
          for (const int64_t n : {1, 5, 255, 257, 512, 600}) {
            const std::vector<float> x = random_rows(n * w->n_in);
            check(*w, multiply(**made, *w, x, n), x, n);
            ++n_checked;
          }
        }
        EXPECT_EQ((*made)->multiply(parts.weights->output(), nullptr, 1, nullptr, 0).code(),
                  StatusCode::internal);
      }
    }
  }
  if (n_checked == 0) GTEST_SKIP() << "this CPU has no products that are worth it";
}

TEST(LoadedLayer, TilesStayTilesWithoutBfloat16) {
  TinyModel tiny;
  tiny.type = GGML_TYPE_Q8_0;
  const LoadedTiny packed(tiny);
  EXPECT_EQ(LoadedLayer::supports(parts_of(*packed.model).plan.layers[0]), LoadedLayer::has_bf16());
}

TEST(LoadedLayer, PromptsAreCloseToInt8) {
  if (!LoadedLayer::has_bf16()) GTEST_SKIP() << "this CPU has no product of bfloat16";
  TinyModel tiny;
  tiny.type =
      GGML_TYPE_F16;  // not packed: ggml's dot product, which rounds activations to half precision only
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
