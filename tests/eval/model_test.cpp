#include <gtest/gtest.h>

#include "eval/eval.h"
#include "support/session.h"
#include "support/smollm2.h"
namespace narrows::testing {
namespace {
TEST(Probe, P) {
  const auto model = smollm2({.float_weights = false});
  for (int64_t context : {500, 1200}) {
    EvalOptions o;
    o.context = context;
    o.tokens = 60;
    o.n_threads = 0;
    o.with_llama_cpp = context == 500;
    for (const char* p : {"f16", "kivi-4", "sals-25", "kivi-2", "sals-12.5", "sals-25:budget=all"})
      o.profiles.push_back(kv(p));
    auto rows = evaluate(model, gpl3_tokens(*model, static_cast<size_t>(context) + 61), o);
    ASSERT_TRUE(rows.ok());
    for (auto& r : *rows)
      std::printf("%ld %-24s ppl %.3f kl %.5f p99 %.4f top1 %.3f mass %.3f c %.2f l %.2f p %.2f\n", context,
                  r.kv.c_str(), r.ppl, r.kl_mean, r.kl_p99, r.top1, r.mass_kept, r.compression(),
                  r.compression_layers(), r.compression_pages());
  }
}
}  // namespace
}  // namespace narrows::testing
