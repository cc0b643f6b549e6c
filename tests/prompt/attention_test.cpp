// PromptAttention: every head of every row against a softmax in double, chunk by chunk, with more threads
// than tasks and fewer; and a whole model whose prompt attends in bfloat16 against the same in float32.
#include "prompt/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

struct Tensors {
  std::vector<float> q, k, v;  ///< [n, heads, head_dim]
};

Tensors normal(const AttentionSizes& sizes, int64_t n) {
  std::mt19937 random(7);
  std::normal_distribution<float> value;
  const auto fill = [&](int64_t count) {
    std::vector<float> x(static_cast<size_t>(count));
    for (float& y : x) y = value(random);
    return x;
  };
  return {fill(n * sizes.n_head * sizes.head_dim), fill(n * sizes.width()), fill(n * sizes.width())};
}

/// window: as of PromptAttention; sink: what the softmax has beside the keys' weights.
double expected(const AttentionSizes& sizes, const Tensors& x, int64_t row, int64_t head, int64_t d,
                int64_t window = 0, double sink = 0) {
  const int64_t head_kv = head / (sizes.n_head / sizes.n_head_kv);
  double total = sink, sum = 0;
  for (int64_t j = window > 0 ? std::max<int64_t>(0, row + 1 - window) : 0; j <= row; ++j) {
    double score = 0;
    for (int64_t c = 0; c < sizes.head_dim; ++c) {
      score += double{x.q[static_cast<size_t>((row * sizes.n_head + head) * sizes.head_dim + c)]} *
               double{x.k[static_cast<size_t>(j * sizes.width() + head_kv * sizes.head_dim + c)]};
    }
    const double w = std::exp(score * double{sizes.scale});
    total += w;
    sum += w * double{x.v[static_cast<size_t>(j * sizes.width() + head_kv * sizes.head_dim + d)]};
  }
  return sum / total;
}

void pack_all(PromptAttention& attention, const AttentionSizes& sizes, const Tensors& x, int64_t from,
              int64_t to) {
  for (int64_t at = from; at < to; at += kernels::kPrefillTile) {
    for (int64_t h = 0; h < sizes.n_head_kv; ++h)
      attention.pack(h, at / kernels::kPrefillTile, x.k.data() + at * sizes.width(),
                     x.v.data() + at * sizes.width(), std::min(kernels::kPrefillTile, to - at));
  }
}

TEST(PromptAttention, EveryHeadAndRowWhateverTheThreads) {
  const AttentionSizes sizes{6, 2, 16, 0.25F};
  constexpr int64_t kTokens = 400;
  const Tensors x = normal(sizes, kTokens);
  const int64_t ld = sizes.n_head * sizes.head_dim;
  for (const int n_threads : {1, 2, 30}) {
    PromptAttention attention(kernels::PrefillKind::f32, sizes, kTokens, n_threads);
    ASSERT_TRUE(attention.ok());
    std::vector<float> out(x.q.size());
    for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, 256}, {256, kTokens}}) {
      pack_all(attention, sizes, x, from, to);
      attention.start(x.q.data() + from * ld, to - from, from, 0, out.data() + from * ld);
      std::vector<std::thread> threads;
      for (int i = 0; i < n_threads; ++i) threads.emplace_back([&attention, i] { attention.run(i); });
      for (std::thread& t : threads) t.join();
    }
    for (int64_t row = 0; row < kTokens; row += 7) {
      for (int64_t i = 0; i < ld; i += 5)
        ASSERT_NEAR(out[static_cast<size_t>(row * ld + i)],
                    expected(sizes, x, row, i / sizes.head_dim, i % sizes.head_dim), 2e-6)
            << row << " " << i;
    }
  }
}

// From a sink that is nothing to one that leaves next to nothing for the keys.
TEST(PromptAttention, SinksOfEveryPrecision) {
  const AttentionSizes sizes{6, 2, 16, 0.25F};
  constexpr int64_t kTokens = 300;
  const std::vector<float> sinks = {-200, -1, 0, 3, 9, 60};
  const Tensors x = normal(sizes, kTokens);
  const int64_t ld = sizes.n_head * sizes.head_dim;
  for (int kind = 0; kind < kernels::kPrefillKinds; ++kind) {
    for (const int64_t window : {0, 40}) {
      PromptAttention attention(static_cast<kernels::PrefillKind>(kind), sizes, kTokens, 1);
      ASSERT_TRUE(attention.ok());
      std::vector<float> out(x.q.size());
      pack_all(attention, sizes, x, 0, kTokens);
      attention.start(x.q.data(), kTokens, 0, window, out.data(), sinks.data());
      attention.run(0);
      EXPECT_TRUE(attention.finite());
      const double tolerance = kind == 0 ? 2e-6 : 0.03;
      for (int64_t row = 0; row < kTokens; row += 7) {
        for (int64_t i = 0; i < ld; i += 5) {
          const int64_t head = i / sizes.head_dim;
          ASSERT_NEAR(out[static_cast<size_t>(row * ld + i)],
                      expected(sizes, x, row, head, i % sizes.head_dim, window,
                               std::exp(double{sinks[static_cast<size_t>(head)]})),
                      tolerance)
              << "kind " << kind << " window " << window << " row " << row << " head " << head;
        }
      }
    }
  }
}

TEST(PromptAttention, MemoryIsWhatIsAllocated) {
  const AttentionSizes sizes{6, 2, 64, 0.125F};
  const auto kind = kernels::PrefillKind::bf16_shift;
  const auto bytes = [&](int64_t n) { return PromptAttention::bytes_needed(kind, sizes, n, 2); };
  EXPECT_EQ(bytes(128), bytes(1));
  // Sparse: a share a head and sampled row, and flags a head and block of rows.
  EXPECT_EQ(PromptAttention::bytes_needed(kind, sizes, 128, 2, 0.9) - bytes(128), 6 * (32 * 4 + 4));
  EXPECT_EQ(bytes(129) - bytes(128), 2 * kernels::ops().prefill[static_cast<int>(kind)]->tile_bytes(64));
}

/// Keys and queries of 2,000 tokens in which every head looks at itself, at token 0 and at tile `at`, and
/// nowhere else.
Tensors looking_at(const AttentionSizes& sizes, int64_t at) {
  Tensors x = normal(sizes, 2000);
  for (int64_t i = 0; i < 2000; ++i) {
    for (int64_t h = 0; h < sizes.n_head; ++h)
      x.q[static_cast<size_t>((i * sizes.n_head + h) * sizes.head_dim)] = 8;
    for (int64_t h = 0; h < sizes.n_head_kv; ++h)
      x.k[static_cast<size_t>(i * sizes.width() + h * sizes.head_dim)] =
          i / kernels::kPrefillTile == at ? 8 : 0;
  }
  return x;
}

TEST(PromptAttention, SparseRowsReadTheTilesThatMatter) {
  const AttentionSizes sizes{6, 2, 16, 0.25F};
  const int64_t ld = sizes.n_head * sizes.head_dim, from = 1536;
  const Tensors x = looking_at(sizes, 5);
  for (const int n_threads : {1, 3}) {
    PromptAttention attention(kernels::PrefillKind::f32, sizes, 2000, n_threads, 0.999);
    ASSERT_TRUE(attention.ok());
    pack_all(attention, sizes, x, 0, 2000);
    ASSERT_TRUE(attention.is_sparse(2000 - from, from, 0));
    std::vector<float> out(x.q.size());
    attention.start(x.q.data() + from * ld, 2000 - from, from, 0, out.data() + from * ld);
    for (const bool choosing : {true, false}) {
      std::vector<std::thread> threads;
      for (int i = 0; i < n_threads; ++i)
        threads.emplace_back([&, i] { choosing ? attention.choose(i) : attention.run(i); });
      for (std::thread& t : threads) t.join();
    }
    for (int64_t row = from; row < 2000; row += 7) {
      for (int64_t i = 0; i < ld; i += 5)
        ASSERT_NEAR(out[static_cast<size_t>(row * ld + i)],
                    expected(sizes, x, row, i / sizes.head_dim, i % sizes.head_dim), 2e-3)
            << row << " " << i;
    }
    // Of 13 to 16 tiles: the first, tile 5, that of the rows themselves and the one before it.
    EXPECT_EQ(attention.tiles_seen(), 6 * (13 + 14 + 15 + 16));
    EXPECT_EQ(attention.tiles_read(), 6 * 4 * 4);
  }
}

TEST(PromptAttention, ShortPromptsAndFewRowsAreDense) {
  const AttentionSizes sizes{6, 2, 16, 0.25F};
  const PromptAttention sparse(kernels::PrefillKind::f32, sizes, 4096, 1, 0.9);
  EXPECT_FALSE(sparse.is_sparse(512, 512, 0));
  EXPECT_TRUE(sparse.is_sparse(512, 2048, 0));
  EXPECT_FALSE(sparse.is_sparse(512, 2048, 1024)) << "a window is short";
  EXPECT_FALSE(sparse.is_sparse(1, 2048, 0));
  EXPECT_FALSE(sparse.is_sparse(513, 2048, 0)) << "more rows than a sample has room for";
  const PromptAttention dense(kernels::PrefillKind::f32, sizes, 4096, 1);
  EXPECT_FALSE(dense.is_sparse(512, 2048, 0));
}

TEST(PromptAttention, SparsePromptsOfModels) {
  TinyModel m;
  m.architecture = "qwen2";
  m.n_ctx = 4096;
  const LoadedTiny tiny(m);
  const std::vector<Token> tokens = random_tokens(3000);
  const auto logits = [&](int n_threads, double mass) {
    auto session = make_session(
        tiny.model, {.n_threads = n_threads, .prompt = {PrefillProducts::int8, PrefillAttention::f32, mass}});
    EXPECT_TRUE(session->prefill(tokens).ok());
    if (mass == 0.5) {  // attention of random numbers is flat: about half of what is neither first nor near
      EXPECT_GT(session->prompt_read(), 0.25);
      EXPECT_LT(session->prompt_read(), 0.6);
    } else {
      EXPECT_GT(session->prompt_read(), 0.99);
    }
    return copy(session->logits());
  };
  const std::vector<float> exact = logits(2, 1), nearly = logits(2, 1 - 1e-6), half = logits(2, 0.5);
  EXPECT_EQ(half, logits(1, 0.5)) << "the same with any number of threads";
  EXPECT_LT(max_difference(exact, nearly), 1e-3);
  EXPECT_GT(max_difference(exact, half), max_difference(exact, nearly));

  SessionOptions options;
  options.prompt.mass = 0.9;
  options.prompt.attention = PrefillAttention::pasa;
  expect_refusal(Session::create(tiny.model, options).status(), StatusCode::invalid_argument,
                 {"--prefill sparse", "pasa", "bf16-shift"});
  options.prompt = {.mass = 0};
  expect_refusal(Session::create(tiny.model, options).status(), StatusCode::invalid_argument,
                 {"above 0", "not 0"});
}

// Tiny random models: what the rounding of attention does to logits of size 1 or so.
TEST(PromptAttention, ModelsInBfloat16AreCloseAndDiffer) {
  TinyModel m;
  m.architecture = "qwen2";
  const LoadedTiny tiny(m);
  const std::vector<Token> tokens = random_tokens(700);
  auto exact = make_session(tiny.model);
  ASSERT_OK(exact->prefill(tokens));
  for (const PrefillAttention how : {PrefillAttention::bf16, PrefillAttention::bf16_shift}) {
    auto session = make_session(tiny.model, {.n_threads = 2, .prompt = {PrefillProducts::int8, how}});
    ASSERT_OK(session->prefill(tokens));
    const double difference = max_difference(exact->logits(), session->logits());
    EXPECT_GT(difference, 0) << attention_name(how);
    EXPECT_LT(difference, 0.05) << attention_name(how);
  }
}

// Keys of layer 1 far beyond half's range: an error that names it, not NaN in the logits.
TEST(PromptAttention, OverflowIsAnErrorThatNamesTheLayer) {
  TinyModel m;
  m.architecture = "qwen2";
  m.edit_tensors = [](std::vector<TinyTensor>& all) {
    for (float& x : tensor(all, "blk.1.attn_k.bias").data) x = 20000;
    for (float& x : tensor(all, "blk.1.attn_q.bias").data) x = 20000;
  };
  const LoadedTiny tiny(m);
  const std::vector<Token> tokens = random_tokens(200);
  auto half = make_session(tiny.model, {.prompt = {PrefillProducts::int8, PrefillAttention::fp16}});
  const Status s = half->prefill(tokens);
  expect_refusal(s, StatusCode::non_finite, {"layer 1", "fp16", "--attention bf16-shift"});
  EXPECT_FALSE(half->prefill(tokens).ok());  // until reset()
  for (const PrefillAttention how : {PrefillAttention::f32, PrefillAttention::bf16_shift})
    ASSERT_OK(make_session(tiny.model, {.prompt = {PrefillProducts::int8, how}})->prefill(tokens));
}

}  // namespace
}  // namespace narrows::testing
