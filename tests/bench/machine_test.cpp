// Limits of the machine: within what any machine can do; and a model's work against counts made by hand.
#include "bench/machine.h"

#include <gtest/gtest.h>

#include "engine/session_impl.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

TEST(Machine, LimitsAreThoseOfAComputer) {
  for (const int n : {1, 2}) {
    const auto limits = measure_machine(n);
    ASSERT_TRUE(limits.ok()) << limits.status().message();
    EXPECT_EQ(limits->n_threads, n);
    // From a slow emulator to more than any two threads reach; a unit that is wrong by 1000 falls out.
    EXPECT_GT(limits->read_bytes_s, 2e8);
    EXPECT_LT(limits->read_bytes_s, 2e11);
    EXPECT_GT(limits->flops_s, 1e9);
    EXPECT_LT(limits->flops_s, 1e13);
    EXPECT_TRUE(limits->flops_format == "f32" || limits->flops_format == "bf16") << limits->flops_format;
  }
}

TEST(Machine, WorkOfAModel) {
  const LoadedTiny loaded{TinyModel()};
  const ModelInfo& hp = loaded.model->info();
  const ModelWork work = work_of(parts_of(*loaded.model).plan);
  const int64_t q = hp.n_head * hp.head_dim, kv = hp.n_head_kv * hp.head_dim;
  const int64_t layer = hp.n_embd * (q + 2 * kv) + q * hp.n_embd + 3 * hp.n_embd * hp.n_ff;
  const int64_t output = hp.n_embd * hp.n_vocab;
  EXPECT_EQ(work.flops_token, 2.0 * static_cast<double>(hp.n_layer * layer));
  EXPECT_EQ(work.flops_logits, 2.0 * static_cast<double>(output));
  EXPECT_EQ(work.weight_bytes, 4 * (hp.n_layer * layer + output));  // the tiny model is in float32
  // Three tokens see 1 + 2 + 3 keys; a query and a key of all heads: a product and a weighted sum.
  const double pairs = 6.0 * 4.0 * static_cast<double>(hp.n_layer * q);
  EXPECT_EQ(work.prompt_flops(3), 3 * work.flops_token + pairs + work.flops_logits);
}

// A token goes through a few of the experts.
TEST(Machine, WorkOfExperts) {
  TinyModel m;
  m.architecture = "qwen3moe";
  m.n_expert = 9;
  m.n_used = 2;
  const LoadedTiny loaded(m);
  const ModelWork work = work_of(parts_of(*loaded.model).plan);
  const int64_t layer = 64 * (64 + 2 * 32) + 64 * 64 + 64 * 9 + 2 * 3 * 64 * 128;
  EXPECT_EQ(work.flops_token, 2.0 * 2 * static_cast<double>(layer));
  EXPECT_EQ(work.weight_bytes, 4 * (2 * layer + 64 * kTinyVocab));
}

}  // namespace
}  // namespace narrows::testing
