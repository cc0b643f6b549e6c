// Each allocation of each call of the C API fails in turn: the call says so, or does without, and the same
// calls after it give what they give. operator new of the whole program is replaced here; what C code takes
// with malloc does not count.
#include <algorithm>
#include <functional>

#include "capi.h"
#include "support/failing_new.h"

namespace narrows::testing {
namespace {

/// fn() with its k-th allocation failing; `failed`: there was one.
narrows_status with_failure(int64_t k, bool* failed, const std::function<narrows_status()>& fn) {
  g_failed = false;
  g_left = k;
  const narrows_status status = fn();
  g_left = -1;
  *failed = g_failed;
  return status;
}

/// A call that begins anew each time: every allocation up to 200, then in steps that grow.
void fail_each(
    const char* name, const std::function<narrows_status()>& call,
    const std::function<void()>& before_each = [] {}) {
  SCOPED_TRACE(name);
  int n_refused = 0;
  bool failed = true;
  for (int64_t k = 0; failed; k += 1 + std::max<int64_t>(0, k - 200) / 10) {
    before_each();
    const narrows_status status = with_failure(k, &failed, call);
    if (!failed) {
      EXPECT_EQ(status, NARROWS_OK) << narrows_last_error();
    } else if (status != NARROWS_OK) {
      ++n_refused;
      EXPECT_STRNE(narrows_last_error(), "") << narrows_status_name(status) << " at " << k;
    }
  }
  EXPECT_GT(n_refused, 0) << "no allocation of it fails";
}

TEST(CApiAllocations, TextModelsSamplersBatches) {
  const char* const path = tiny().cpp.path.c_str();
  narrows_model* const m = tiny().c.get();
  fail_each("load", [&] {
    narrows_model* made = nullptr;
    const narrows_status s = narrows_model_load(path, nullptr, &made);
    EXPECT_EQ(made != nullptr, s == NARROWS_OK);
    narrows_model_free(made);
    return s;
  });
  const std::string text = "A text of some words, and <|im_end|> in it";
  fail_each("tokenize", [&] {
    size_t n = 0;
    return narrows_tokenize(m, text.data(), text.size(), 1, 1, nullptr, 0, &n);
  });
  const narrows_chat_message chat[] = {
      {"user", "A message that is long enough not to fit into the string itself"}};
  fail_each("chat", [&] {
    size_t n = 0;
    return narrows_chat_tokenize(m, chat, 1, 1, nullptr, 0, &n);
  });
  narrows_sampler_options o;
  narrows_sampler_options_init(&o);
  o.grammar = "root ::= (\"yes\" | \"no\") \" \" [a-z]+";
  const std::vector<float> logits(static_cast<size_t>(tiny().cpp.model->info().n_vocab), 1.0F);
  fail_each("sampler", [&] {
    narrows_sampler* made = nullptr;
    Token t = -1;
    narrows_status s = narrows_sampler_create(m, &o, &made);
    EXPECT_EQ(made != nullptr, s == NARROWS_OK);
    if (s == NARROWS_OK) s = narrows_sampler_sample(made, logits.data(), logits.size(), &t);
    if (s == NARROWS_OK) s = narrows_sampler_accept(made, t);
    if (s == NARROWS_OK) s = narrows_sampler_sample(made, logits.data(), logits.size(), &t);
    narrows_sampler_free(made);
    return s;
  });
  fail_each("batch", [&] {
    narrows_batch* made = nullptr;
    const narrows_status s = narrows_batch_create(m, 4, 2, &made);
    narrows_batch_free(made);
    return s;
  });
}

TEST(CApiAllocations, Sessions) {
  const auto tokens = random_tokens(900);
  const TempDir dir;
  const std::string path = dir.path("a.session");
  for (const char* kv : {"f16", "klt"}) {
    SCOPED_TRACE(kv);
    const narrows_session_options o = c_options(kv, 2);
    const CSession want = c_session(o);
    c_prefill(want.get(), tokens);
    ASSERT_C(narrows_session_save(want.get(), tokens.data(), tokens.size(), path.c_str()));
    const auto said = c_greedy(want.get(), 8);

    fail_each("create", [&] {
      narrows_session* made = nullptr;
      const narrows_status s = narrows_session_create(tiny().c.get(), &o, &made);
      EXPECT_EQ(made != nullptr, s == NARROWS_OK);
      narrows_session_free(made);
      return s;
    });
    fail_each("load", [&] {
      narrows_session* made = nullptr;
      const narrows_status s = narrows_session_load(tiny().c.get(), &o, path.c_str(), &made);
      EXPECT_EQ(made != nullptr, s == NARROWS_OK);
      narrows_session_free(made);
      return s;
    });
    const CSession c = c_session(o);
    const auto reset = [&] { EXPECT_C(narrows_session_reset(c.get())); };
    fail_each(
        "prompt",
        [&] { return narrows_session_prefill(c.get(), tokens.data(), tokens.size(), nullptr, nullptr); },
        reset);
    EXPECT_EQ(c_greedy(c.get(), 8), said) << "after all that failed";
    reset();
    c_prefill(c.get(), tokens);
    fail_each("save",
              [&] { return narrows_session_save(c.get(), tokens.data(), tokens.size(), path.c_str()); });
  }
}

}  // namespace
}  // namespace narrows::testing
