// What a prompt gives beside the logits after its last token: hidden states, against libllama's embeddings,
// and the logits after every token.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <numeric>

#include "support/llama_reference.h"
#include "support/session.h"
#include "support/tiny_cases.h"

namespace narrows::testing {
namespace {

double cosine(std::span<const float> a, std::span<const float> b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    ab += double{a[i]} * b[i];
    aa += double{a[i]} * a[i];
    bb += double{b[i]} * b[i];
  }
  return ab / std::sqrt(aa * bb);
}

struct Rows {
  std::vector<std::vector<float>> hidden, logits;
};

/// Reads the tokens; every row that the session gives.
Rows rows_of(Session& session, std::span<const Token> tokens) {
  Rows rows;
  rows.logits.resize(tokens.size());
  PromptRows wanted;
  wanted.hidden = [&](int64_t index, std::span<const float> row) {
    EXPECT_EQ(index, static_cast<int64_t>(rows.hidden.size()));
    rows.hidden.push_back(copy(row));
  };
  wanted.logits = [&](int64_t index, std::span<const float> row) {
    rows.logits.at(static_cast<size_t>(index)) = copy(row);
  };
  const Status begun = session.begin_prefill(tokens, wanted);
  EXPECT_TRUE(begun.ok()) << begun.message();
  while (begun.ok() && session.prefill_done() < 1) {
    const Status s = session.prefill_step();
    EXPECT_TRUE(s.ok()) << s.message();
    if (!s.ok()) break;
  }
  return rows;
}

std::vector<float> mean_of(const std::vector<std::vector<float>>& rows) {
  std::vector<double> sum(rows.front().size());
  for (const auto& row : rows)
    std::transform(row.begin(), row.end(), sum.begin(), sum.begin(), std::plus<>());
  std::vector<float> mean;
  for (const double x : sum) mean.push_back(static_cast<float>(x / static_cast<double>(rows.size())));
  return mean;
}

TEST(PromptRows, HiddenStatesAreLibllamasEmbeddings) {
  const LoadedTiny tiny{TinyModel{}};
  for (const int64_t n : {1, 40, 700}) {
    const std::vector<Token> tokens = random_tokens(n);
    auto session = make_session(tiny.model);
    const Rows rows = rows_of(*session, tokens);
    ASSERT_EQ(static_cast<int64_t>(rows.hidden.size()), n);
    EXPECT_GT(cosine(llama_embedding(tiny.path, tokens, LlamaPooling::last), rows.hidden.back()), .99999)
        << n;
    EXPECT_GT(cosine(llama_embedding(tiny.path, tokens, LlamaPooling::mean), mean_of(rows.hidden)), .99999)
        << n;
  }
}

TEST(PromptRows, LogitsAfterEveryTokenAreLibllamas) {
  const LoadedTiny tiny{TinyModel{}};
  const std::vector<Token> tokens = random_tokens(150);
  auto session = make_session(tiny.model, {.n_threads = 2});
  const Rows rows = rows_of(*session, tokens);
  const LogitRows theirs = llama_logits(tiny.path, tokens, LlamaWay::exact);
  for (size_t i = 0; i < tokens.size(); ++i) {
    ASSERT_EQ(rows.logits[i].size(), static_cast<size_t>(theirs.n_vocab)) << i;
    const auto row = theirs.row(static_cast<int64_t>(i));
    EXPECT_LT(max_difference(row, rows.logits[i]), 1e-3 * standard_deviation(row)) << i;
  }
  // The session goes on as one that was asked for nothing.
  auto plain = make_session(tiny.model, {.n_threads = 2});
  ASSERT_OK(plain->prefill(tokens));
  EXPECT_EQ(copy(plain->logits()), copy(session->logits()));
  ASSERT_OK(plain->decode(7));
  ASSERT_OK(session->decode(7));
  EXPECT_EQ(copy(plain->logits()), copy(session->logits()));
}

TEST(PromptRows, OfSeveralStripesCountThroughAndEndWithThePrompt) {
  TinyModel m;
  m.n_ctx = 8192;
  const LoadedTiny tiny{m};
  const std::vector<Token> tokens = random_tokens(6500);
  auto session = make_session(tiny.model, {.n_threads = 2, .segments = true});
  const Rows rows = rows_of(*session, tokens);
  EXPECT_EQ(rows.hidden.size(), tokens.size());
  EXPECT_EQ(rows.logits.back(), copy(session->logits()));
  session->reset();
  ASSERT_OK(session->prefill(std::span(tokens).first(300)));
  EXPECT_LT(max_difference(rows.logits[299], session->logits()), 1e-2 * standard_deviation(rows.logits[299]));
  EXPECT_EQ(rows.hidden.size(), tokens.size()) << "a later prompt gave rows that nobody asked for";
}

TEST(PromptRows, AreGivenByARecurrentModel) {
  for (const TinyCase& c : float_cases()) {
    if (!c.model.is_hybrid()) continue;
    const LoadedTiny tiny{c.model};
    const std::vector<Token> tokens = random_tokens(70);
    auto session = make_session(tiny.model);
    const Rows rows = rows_of(*session, tokens);
    EXPECT_EQ(rows.logits.back(), copy(session->logits())) << c.name;
    EXPECT_GT(cosine(llama_embedding(tiny.path, tokens, LlamaPooling::mean), mean_of(rows.hidden)), .999)
        << c.name;
  }
}

}  // namespace
}  // namespace narrows::testing
