// What can be done wrong through the C API comes back as a status and a sentence, and nothing ends the
// program.
#include <functional>
#include <stdexcept>
#include <thread>

#include "capi.h"

namespace narrows::testing {
namespace {

TEST(CApiErrors, NullIsRefusedByEveryCall) {
  narrows_model* const m = tiny().c.get();
  const CSession held = c_session(c_options());
  narrows_session* const s = held.get();
  const std::string& path = tiny().cpp.path;
  const char* const p = path.c_str();
  const Token t[] = {1};
  const float logits[] = {0};
  narrows_status each[1];
  narrows_session* sessions[] = {s};
  narrows_session* no_session[] = {nullptr};
  narrows_model* model_out = nullptr;
  narrows_session* session_out = nullptr;
  narrows_sampler* sampler_out = nullptr;
  narrows_batch* batch_out = nullptr;
  ASSERT_C(narrows_batch_create(m, 1, 1, &batch_out));
  const CBatch batch(batch_out);
  narrows_sampler* made = nullptr;
  ASSERT_C(narrows_sampler_create(m, nullptr, &made));
  const CSampler sampler(made);
  narrows_model_info info = {};
  info.struct_size = sizeof info;
  narrows_cache_stats stats = {};
  stats.struct_size = sizeof stats;
  const narrows_chat_message no_role[] = {{nullptr, "x"}};
  const narrows_chat_message no_content[] = {{"user", nullptr}};
  char text[8];
  Token tokens[8];
  const std::function<narrows_status()> calls[] = {
      [&] { return narrows_model_load(nullptr, nullptr, &model_out); },
      [&] { return narrows_model_load(p, nullptr, nullptr); },
      [&] { return narrows_model_get_info(nullptr, &info); },
      [&] { return narrows_model_get_info(m, nullptr); },
      [&] { return narrows_tokenize(nullptr, "a", 1, 0, 0, nullptr, 0, nullptr); },
      [&] { return narrows_tokenize(m, nullptr, 1, 0, 0, nullptr, 0, nullptr); },
      [&] { return narrows_tokenize(m, "a", 1, 0, 0, nullptr, 5, nullptr); },
      [&] { return narrows_detokenize(nullptr, t, 1, 0, text, 8, nullptr); },
      [&] { return narrows_detokenize(m, nullptr, 1, 0, text, 8, nullptr); },
      [&] { return narrows_detokenize(m, t, 1, 0, nullptr, 8, nullptr); },
      [&] { return narrows_chat_render(nullptr, no_role, 1, 1, text, 8, nullptr); },
      [&] { return narrows_chat_render(m, nullptr, 1, 1, text, 8, nullptr); },
      [&] { return narrows_chat_render(m, no_role, 1, 1, text, 8, nullptr); },
      [&] { return narrows_chat_tokenize(m, no_content, 1, 1, tokens, 8, nullptr); },
      [&] { return narrows_session_create(nullptr, nullptr, &session_out); },
      [&] { return narrows_session_create(m, nullptr, nullptr); },
      [&] { return narrows_session_prefill(nullptr, t, 1, nullptr, nullptr); },
      [&] { return narrows_session_prefill(s, nullptr, 1, nullptr, nullptr); },
      [&] { return narrows_session_begin_prefill(nullptr, t, 1); },
      [&] { return narrows_session_begin_prefill(s, nullptr, 1); },
      [&] { return narrows_session_prefill_step(nullptr); },
      [&] { return narrows_session_decode(nullptr, 1); },
      [&] { return narrows_session_reset(nullptr); },
      [&] { return narrows_session_go_back(nullptr, 0, nullptr); },
      [&] { return narrows_session_share_prefix(nullptr, s, 1); },
      [&] { return narrows_session_share_prefix(s, nullptr, 1); },
      [&] { return narrows_session_get_cache_stats(nullptr, &stats); },
      [&] { return narrows_session_get_cache_stats(s, nullptr); },
      [&] { return narrows_memory_get_stats(nullptr); },
      [&] { return narrows_session_save(nullptr, t, 1, p); },
      [&] { return narrows_session_save(s, nullptr, 1, p); },
      [&] { return narrows_session_save(s, t, 1, nullptr); },
      [&] { return narrows_session_load(nullptr, nullptr, p, &session_out); },
      [&] { return narrows_session_load(m, nullptr, nullptr, &session_out); },
      [&] { return narrows_session_load(m, nullptr, p, nullptr); },
      [&] { return narrows_session_saved_tokens(nullptr, nullptr, 0, nullptr); },
      [&] { return narrows_sampler_create(nullptr, nullptr, &sampler_out); },
      [&] { return narrows_sampler_create(m, nullptr, nullptr); },
      [&] { return narrows_sampler_sample(nullptr, logits, 1, tokens); },
      [&] { return narrows_sampler_sample(sampler.get(), nullptr, 1, tokens); },
      [&] { return narrows_sampler_sample(sampler.get(), logits, 1, nullptr); },
      [&] { return narrows_sampler_accept(nullptr, 1); },
      [&] { return narrows_sampler_accept_prompt(nullptr, 1); },
      [&] { return narrows_batch_create(nullptr, 1, 1, &batch_out); },
      [&] { return narrows_batch_create(m, 1, 1, nullptr); },
      [&] { return narrows_batch_decode(nullptr, sessions, t, 1, each); },
      [&] { return narrows_batch_decode(batch.get(), nullptr, t, 1, each); },
      [&] { return narrows_batch_decode(batch.get(), sessions, nullptr, 1, each); },
      [&] { return narrows_batch_decode(batch.get(), sessions, t, 1, nullptr); },
      [&] { return narrows_batch_decode(batch.get(), no_session, t, 1, each); },
  };
  for (size_t i = 0; i < std::size(calls); ++i) {
    SCOPED_TRACE(i);
    expect_refused(calls[i](), NARROWS_INVALID_ARGUMENT, "NULL");
  }
  EXPECT_EQ(model_out, nullptr);
  EXPECT_EQ(session_out, nullptr);
  EXPECT_EQ(sampler_out, nullptr);
  EXPECT_EQ(batch_out, nullptr);

  narrows_model_free(nullptr);
  narrows_session_free(nullptr);
  narrows_sampler_free(nullptr);
  narrows_batch_free(nullptr);
  size_t n = 5;
  EXPECT_EQ(narrows_session_logits(nullptr, &n), nullptr);
  EXPECT_EQ(n, 0U);
  EXPECT_EQ(narrows_session_n_past(nullptr), -1);
  EXPECT_EQ(narrows_session_n_ctx(nullptr), -1);
  EXPECT_EQ(narrows_session_n_threads(nullptr), -1);
  EXPECT_EQ(narrows_session_prefill_done(nullptr), -1);
  EXPECT_EQ(narrows_session_prompt_read(nullptr), -1);
  EXPECT_EQ(narrows_session_kept_prefix(nullptr, 5), -1);
  EXPECT_EQ(narrows_is_end(nullptr, 1), 0);
  EXPECT_STREQ(narrows_batch_error(nullptr, 0), "");
  narrows_model_options_init(nullptr);
  narrows_session_options_init(nullptr);
  narrows_sampler_options_init(nullptr);
}

TEST(CApiErrors, FilesAndNumbersThatAreWrong) {
  const TempDir dir;
  narrows_model* m = tiny().c.get();
  expect_refused(narrows_model_load(dir.path("none.gguf").c_str(), nullptr, &m), NARROWS_INVALID_FILE,
                 "none.gguf");
  EXPECT_EQ(m, nullptr);
  expect_refused(narrows_model_load(dir.file("text.gguf", "no model").c_str(), nullptr, &m),
                 NARROWS_INVALID_FILE, "text.gguf");
  m = tiny().c.get();

  narrows_session* s = nullptr;
  const auto create = [&](auto change) {
    narrows_session_options o = c_options();
    change(o);
    const narrows_status status = narrows_session_create(m, &o, &s);
    EXPECT_EQ(s, nullptr);
    return status;
  };
  using O = narrows_session_options;
  expect_refused(create([](O& o) { o.kv = "klt-99x"; }), NARROWS_INVALID_ARGUMENT, "klt-99x");
  expect_refused(create([](O& o) { o.kv = "klt:k=nan"; }), NARROWS_INVALID_ARGUMENT, "k=nan");
  expect_refused(create([](O& o) { o.products = "int4"; }), NARROWS_INVALID_ARGUMENT, "int4");
  expect_refused(create([](O& o) { o.attention = "f8"; }), NARROWS_INVALID_ARGUMENT, "f8");
  expect_refused(create([](O& o) { o.prefill = "sparse:mass=2"; }), NARROWS_INVALID_ARGUMENT, "sparse");
  expect_refused(create([](O& o) { o.n_ctx = 1 << 30; }), NARROWS_INVALID_ARGUMENT, "out of range");
  expect_refused(create([](O& o) { o.n_threads = -1; }), NARROWS_INVALID_ARGUMENT, "threads");
  expect_refused(create([&](O& o) { o.basis_path = tiny().cpp.path.c_str(); }), NARROWS_INVALID_FILE,
                 "basis");
  expect_refused(narrows_session_load(m, nullptr, dir.path("none.session").c_str(), &s), NARROWS_INVALID_FILE,
                 "none.session");
  expect_refused(narrows_session_load(m, nullptr, tiny().cpp.path.c_str(), &s), NARROWS_INVALID_FILE,
                 "session");

  const CSession held = c_session([] {
    O o = c_options();
    o.n_ctx = 64;
    return o;
  }());
  const auto tokens = random_tokens(65);
  expect_refused(narrows_session_prefill(held.get(), tokens.data(), 65, nullptr, nullptr),
                 NARROWS_CONTEXT_FULL, "65");
  expect_refused(narrows_session_prefill(held.get(), tokens.data(), 0, nullptr, nullptr),
                 NARROWS_INVALID_ARGUMENT, "empty");
  const Token outside[] = {1, -1};
  EXPECT_NE(narrows_session_prefill(held.get(), outside, 2, nullptr, nullptr), NARROWS_OK);
  ASSERT_C(narrows_session_reset(held.get()));
  c_prefill(held.get(), std::span(tokens).first(64));
  expect_refused(narrows_session_decode(held.get(), 1), NARROWS_CONTEXT_FULL, "64");
  expect_refused(narrows_session_save(held.get(), tokens.data(), 3, dir.path("a").c_str()),
                 NARROWS_INVALID_ARGUMENT, "3 tokens");
  expect_refused(narrows_session_save(held.get(), tokens.data(), 64, "/nowhere/a"), NARROWS_INVALID_ARGUMENT,
                 "/nowhere");

  expect_refused(narrows_tokenize(m, "a\xff", 2, 0, 0, nullptr, 0, nullptr), NARROWS_INVALID_ARGUMENT,
                 "UTF-8");
  narrows_sampler* sampler = nullptr;
  narrows_sampler_options so;
  narrows_sampler_options_init(&so);
  so.top_p = 7;
  expect_refused(narrows_sampler_create(m, &so, &sampler), NARROWS_INVALID_ARGUMENT, "top-p");
  narrows_sampler_options_init(&so);
  so.grammar = "root ::= (";
  expect_refused(narrows_sampler_create(m, &so, &sampler), NARROWS_INVALID_ARGUMENT, "grammar");
  narrows_sampler_options_init(&so);
  so.n_logit_bias = 2;
  expect_refused(narrows_sampler_create(m, &so, &sampler), NARROWS_INVALID_ARGUMENT, "NULL");
  EXPECT_EQ(sampler, nullptr);
  narrows_batch* batch = nullptr;
  expect_refused(narrows_batch_create(m, 65, 1, &batch), NARROWS_INVALID_ARGUMENT, "65");
}

TEST(CApiErrors, AnExceptionOfACallbackEndsAtTheBorder) {
  const CSession s = c_session(c_options());
  const auto tokens = random_tokens(100);
  const narrows_progress thrower = [](double, void*) -> int { throw std::runtime_error("from outside"); };
  expect_refused(narrows_session_prefill(s.get(), tokens.data(), tokens.size(), thrower, nullptr),
                 NARROWS_INTERNAL, "from outside");
  ASSERT_C(narrows_session_reset(s.get()));
  c_prefill(s.get(), tokens);
}

TEST(CApiErrors, TheLastErrorIsTheThreadsOwn) {
  expect_refused(narrows_model_load(nullptr, nullptr, nullptr), NARROWS_INVALID_ARGUMENT, "path");
  std::string other = "x", later;
  std::thread([&] {
    other = narrows_last_error();
    (void)narrows_session_reset(nullptr);
    later = narrows_last_error();
  }).join();
  EXPECT_EQ(other, "");
  EXPECT_EQ(later, "session is NULL");
  EXPECT_STREQ(narrows_last_error(), "path is NULL");
  const CSession s = c_session(c_options());
  EXPECT_STREQ(narrows_last_error(), "path is NULL") << "what goes well leaves it";
}

TEST(CApiErrors, StatusNames) {
  EXPECT_STREQ(narrows_status_name(NARROWS_OK), "ok");
  EXPECT_STREQ(narrows_status_name(NARROWS_INTERNAL), "internal");
  EXPECT_STREQ(narrows_status_name(NARROWS_BUFFER_TOO_SMALL), "buffer_too_small");
  EXPECT_STREQ(narrows_status_name(11), "unknown");
  EXPECT_STREQ(narrows_status_name(-1), "unknown");
}

}  // namespace
}  // namespace narrows::testing
