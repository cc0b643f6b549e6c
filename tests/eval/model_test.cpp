// Quality on a real model and text: the order of the profiles, by margins several times wider than what
// rounding of quantised products moves.
#include <gtest/gtest.h>

#include "eval/eval.h"
#include "support/session.h"
#include "support/smollm2.h"

namespace narrows::testing {
namespace {

std::vector<EvalRow> rows_of(const std::vector<std::string>& profiles, int64_t context, bool with_llama_cpp) {
  const auto model = smollm2({.float_weights = false});
  EvalOptions options;
  options.context = context;
  options.tokens = 60;
  options.n_threads = 0;
  options.with_llama_cpp = with_llama_cpp;
  for (const std::string& profile : profiles) options.profiles.push_back(kv(profile));
  auto rows = evaluate(model, gpl3_tokens(*model, static_cast<size_t>(context) + 61), options);
  EXPECT_TRUE(rows.ok()) << rows.status().message();
  return rows.ok() ? std::move(*rows) : std::vector<EvalRow>{};
}

const EvalRow& row(const std::vector<EvalRow>& rows, const std::string& name) {
  for (const EvalRow& r : rows) {
    if (r.kv == name) return r;
  }
  ADD_FAILURE() << "no row " << name;
  return rows.front();
}

TEST(SmolLM2Quality, KltLosesLessThanThePublishedProfilesAtNoMoreBytes) {
  const std::vector<std::string> names = {"f16", "kivi-4", "kivi-2", "sals-25", "klt", "klt:budget=all"};
  const std::vector<EvalRow> rows = rows_of(names, 1200, false);
  ASSERT_EQ(rows.size(), names.size());
  const double klt = row(rows, "klt").kl_mean;
  EXPECT_LT(row(rows, "f16").kl_mean, 0.02);
  EXPECT_LT(row(rows, "kivi-4").kl_mean, 0.05);
  EXPECT_LT(klt, 0.05);
  EXPECT_LT(klt * 2, row(rows, "sals-25").kl_mean);
  EXPECT_LT(klt * 2, row(rows, "kivi-2").kl_mean);
  EXPECT_GT(row(rows, "klt").compression_pages(), 5.5);
  EXPECT_GT(row(rows, "klt").compression_pages(), row(rows, "sals-25").compression_pages());
  EXPECT_GT(row(rows, "klt").mass_kept, row(rows, "sals-25").mass_kept);
  EXPECT_LE(row(rows, "klt").mass_kept, row(rows, "klt").mass_best + 1e-6);
}

TEST(SmolLM2Quality, LlamaCppIsAsFarAsRoundingIs) {
  const std::vector<EvalRow> rows = rows_of({"f16"}, 500, true);
  ASSERT_EQ(rows.size(), 4U);  // ours, llama.cpp's two attention paths, and those two against each other
  for (size_t i = 1; i < rows.size(); ++i) {
    EXPECT_GT(rows[i].kl_mean, 0) << rows[i].kv;
    EXPECT_LT(rows[i].kl_mean, 0.03) << rows[i].kv;
    EXPECT_GT(rows[i].top1, 0.85) << rows[i].kv;
  }
}

}  // namespace
}  // namespace narrows::testing
