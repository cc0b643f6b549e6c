// The products of a short prompt are those of a step, row by row, for any number of rows and threads; two
// products may share one rounding; weights that are not packed are left to ggml.
#include "prefill/packed_products.h"

#include <gtest/gtest.h>

#include "model/linear.h"
#include "support/session.h"
#include "support/tiny_cases.h"

namespace narrows::testing {
namespace {

TEST(PackedProducts, AreThoseOfAStep) {
  for (const TinyCase& c : quantised_cases()) {
    const LoadedTiny loaded(c.model);
    const ModelWeights& weights = loaded.model->weights();
    const LayerWeights& l = weights.layer(0);
    // Two weights with the same input, and one with another.
    ggml_tensor* first = l.gate_up != nullptr ? l.gate_up : l.gate;
    ggml_tensor* second = l.wqkv != nullptr ? l.wqkv : l.wv;
    PackedProducts products(weights);
    for (const int64_t n : {1, 2, 7, 63, 64, 65, 130}) {
      for (const int n_threads : {1, 3}) {
        std::vector<float> x(static_cast<size_t>(n * c.model.n_embd));
        for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i * i % 1009));
        products.begin();
        ggml_context* ctx = ggml_init({ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true});
        ggml_cgraph* graph = ggml_new_graph(ctx);
        ggml_tensor* in = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.model.n_embd, n);
        std::vector<ggml_tensor*> out;
        for (ggml_tensor* w : {first, second}) {
          out.push_back(products.multiply(ctx, w, in));
          EXPECT_EQ(out.back()->op == GGML_OP_CUSTOM, weights.packed(w) != nullptr);
          ggml_build_forward_expand(graph, out.back());
        }
        ASSERT_TRUE(products.ok());
        ggml_backend_buffer_t buffer =
            ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
        std::copy(x.begin(), x.end(), static_cast<float*>(in->data));
        GraphRunner runner(n_threads);
        ASSERT_OK(runner.run(graph));
        for (size_t i = 0; i < 2; ++i) {
          ggml_tensor* w = i == 0 ? first : second;
          if (weights.packed(w) == nullptr) continue;
          std::vector<float> want(static_cast<size_t>(n * w->ne[1]));
          LinearInput input;
          ASSERT_TRUE(input.reserve(n, w->ne[0]));
          input.set(x.data(), w->ne[0], n, w->ne[0]);
          Linear(weights, w).multiply(0, w->ne[1], input, want.data(), w->ne[1], false);
          const std::vector<float> got(static_cast<const float*>(out[i]->data),
                                       static_cast<const float*>(out[i]->data) + want.size());
          ASSERT_EQ(max_difference(want, got), 0)
              << c.name << ", " << n << " rows, " << n_threads << " threads";
        }
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
      }
    }
  }
}

// A prompt and the same tokens in steps, with all keys exact in both: the products are the same, the
// attention's order of sums is not.
TEST(PackedProducts, APromptIsItsSteps) {
  for (const TinyCase& c : quantised_cases()) {
    const LoadedTiny loaded(c.model);
    const auto tokens = random_tokens(40);
    auto prompt = make_session(loaded.model), steps = make_session(loaded.model);
    ASSERT_OK(prompt->prefill(tokens));
    ASSERT_OK(steps->prefill(std::span(tokens).first(1)));
    const auto rows = decode_all(*steps, std::span(tokens).subspan(1));
    EXPECT_LT(kl_divergence(prompt->logits(), rows.back()), 5e-3) << c.name;
  }
}

}  // namespace
}  // namespace narrows::testing
