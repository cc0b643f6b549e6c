// The C API gives what the C++ API gives, to the last bit.
#include "capi.h"

#include <limits>
#include <set>

#include "narrows/sampling.h"
#include "narrows/session_file.h"

namespace narrows::testing {
namespace {

TEST(CApi, FactsOfTheModel) {
  narrows_model_info info = {};
  info.struct_size = sizeof info;
  ASSERT_C(narrows_model_get_info(tiny().c.get(), &info));
  const ModelInfo& want = tiny().cpp.model->info();
  EXPECT_EQ(info.architecture, want.architecture);
  EXPECT_EQ(info.fingerprint, want.fingerprint);
  EXPECT_EQ(info.n_layer, 4);
  EXPECT_EQ(info.n_embd, want.n_embd);
  EXPECT_EQ(info.n_ff, want.n_ff);
  EXPECT_EQ(info.n_head, want.n_head);
  EXPECT_EQ(info.n_head_kv, want.n_head_kv);
  EXPECT_EQ(info.head_dim, want.head_dim);
  EXPECT_EQ(info.n_vocab, want.n_vocab);
  EXPECT_EQ(info.n_ctx_train, 4096);
  EXPECT_EQ(info.weight_bytes, want.weight_bytes);
  EXPECT_EQ(info.has_chat_template, 0);
  EXPECT_STREQ(info.name, want.name.c_str());
}

TEST(CApi, MemoryIsCountedAndLimited) {
  ASSERT_NE(tiny().c.get(), nullptr);
  narrows_memory_stats before = {}, now = {};
  before.struct_size = now.struct_size = sizeof before;
  ASSERT_C(narrows_memory_get_stats(&before));
  EXPECT_GT(before.weights, 0);
  EXPECT_GT(before.free, 0);
  EXPECT_EQ(before.limit, 0);
  const auto tokens = random_tokens(2000);
  const CSession session = c_session(c_options("f16", 2));
  const int64_t held = before.weights + before.caches + before.scratch;
  ASSERT_C(narrows_memory_set_limit(held + 300'000));
  ASSERT_C(narrows_memory_get_stats(&now));
  EXPECT_EQ(now.limit, held + 300'000);
  EXPECT_LE(now.free, 300'000);
  EXPECT_EQ(narrows_session_prefill(session.get(), tokens.data(), tokens.size(), nullptr, nullptr),
            NARROWS_OUT_OF_MEMORY);
  EXPECT_EQ(narrows_memory_set_limit(-1), NARROWS_INVALID_ARGUMENT);
  ASSERT_C(narrows_memory_set_limit(0));
  c_prefill(session.get(), tokens);
  ASSERT_C(narrows_memory_get_stats(&now));
  EXPECT_GT(now.caches, before.caches);
  EXPECT_EQ(now.prompts, 0);
}

class Profiles : public ::testing::TestWithParam<const char*> {};

TEST_P(Profiles, PromptStepsAndMemoryAreThoseOfCpp) {
  const auto tokens = random_tokens(900);
  auto cpp = make_session(tiny().cpp.model, {.kv = GetParam(), .n_threads = 2});
  ASSERT_OK(cpp->prefill(tokens));
  const CSession c = c_session(c_options(GetParam(), 2));
  EXPECT_EQ(narrows_session_n_threads(c.get()), 2);
  EXPECT_EQ(narrows_session_n_ctx(c.get()), 4096);
  c_prefill(c.get(), tokens);
  EXPECT_EQ(c_logits(c.get()), copy(cpp->logits()));
  EXPECT_EQ(c_greedy(c.get(), 20), greedy(*cpp, 20));
  EXPECT_EQ(c_logits(c.get()), copy(cpp->logits()));
  EXPECT_EQ(narrows_session_n_past(c.get()), 920);

  narrows_cache_stats stats = {};
  stats.struct_size = sizeof stats;
  ASSERT_C(narrows_session_get_cache_stats(c.get(), &stats));
  const CacheStats want = cpp->cache_stats();
  EXPECT_EQ(stats.n_tokens, 920);
  EXPECT_EQ(stats.bytes, want.bytes);
  EXPECT_EQ(stats.bytes_f16, want.bytes_f16);
  EXPECT_EQ(stats.bytes_compressed_layers, want.bytes_compressed_layers);
  EXPECT_EQ(stats.bytes_f16_compressed_layers, want.bytes_f16_compressed_layers);
  EXPECT_EQ(stats.bytes_pages, want.bytes_pages);
  EXPECT_EQ(stats.bytes_f16_pages, want.bytes_f16_pages);
  EXPECT_EQ(stats.bytes_hot, want.bytes_hot);
  EXPECT_EQ(stats.n_layer_compressed, want.n_layer_compressed);
}

INSTANTIATE_TEST_SUITE_P(CApi, Profiles,
                         ::testing::Values("f16", "kivi-4", "klt:k=2,v=3,budget=64", "sals-25"));

TEST(CApi, OptionsThatAreLeftOutAreTheProgramsDefaults) {
  narrows_session* made = nullptr;
  ASSERT_C(narrows_session_create(tiny().c.get(), nullptr, &made));
  const CSession c(made);
  SessionOptions options;
  options.kv = kv(kDefaultProfile);
  auto cpp = Session::create(tiny().cpp.model, options);
  ASSERT_TRUE(cpp.ok());
  const auto tokens = random_tokens(1000);
  c_prefill(c.get(), tokens);
  ASSERT_OK((*cpp)->prefill(tokens));
  EXPECT_EQ(c_logits(c.get()), copy((*cpp)->logits()));
  EXPECT_EQ(narrows_session_n_threads(c.get()), (*cpp)->n_threads());
}

TEST(CApi, SparsePromptsAndOtherPrecisionsArriveAtTheEngine) {
  const auto tokens = random_tokens(2000);
  PromptOptions prompt = {PrefillProducts::int8, PrefillAttention::f32, 0.5};
  auto cpp = make_session(tiny().cpp.model, {.kv = "f16", .prompt = prompt});
  ASSERT_OK(cpp->prefill(tokens));
  narrows_session_options o = c_options();
  o.prefill = "sparse:mass=0.5";
  const CSession sparse = c_session(o);
  c_prefill(sparse.get(), tokens);
  EXPECT_EQ(c_logits(sparse.get()), copy(cpp->logits()));
  EXPECT_EQ(narrows_session_prompt_read(sparse.get()), cpp->prompt_read());
  EXPECT_LT(narrows_session_prompt_read(sparse.get()), 1);

  prompt = {PrefillProducts::int8, PrefillAttention::pasa, 1};
  auto half = make_session(tiny().cpp.model, {.kv = "f16", .prompt = prompt});
  ASSERT_OK(half->prefill(tokens));
  o = c_options();
  o.attention = "pasa";
  const CSession c = c_session(o);
  c_prefill(c.get(), tokens);
  EXPECT_EQ(c_logits(c.get()), copy(half->logits()));
}

TEST(CApi, TextToTokensAndBackWithBuffersOfTheCaller) {
  const std::string text = "Hello, w\xc3\xb6rld";
  const auto want = tiny().cpp.model->tokenizer().encode(text, true, false);
  ASSERT_TRUE(want.ok());
  size_t n = 0;
  ASSERT_C(narrows_tokenize(tiny().c.get(), text.data(), text.size(), 1, 0, nullptr, 0, &n));
  ASSERT_EQ(n, want->size());
  std::vector<Token> tokens(n, -7);
  EXPECT_EQ(narrows_tokenize(tiny().c.get(), text.data(), text.size(), 1, 0, tokens.data(), n - 1, &n),
            NARROWS_BUFFER_TOO_SMALL);
  EXPECT_EQ(n, want->size());
  EXPECT_EQ(tokens.front(), -7) << "a buffer that is too small stays as it was";
  EXPECT_NE(std::string(narrows_last_error()).find(std::to_string(n)), std::string::npos);
  ASSERT_C(narrows_tokenize(tiny().c.get(), text.data(), text.size(), 1, 0, tokens.data(), n, &n));
  EXPECT_EQ(tokens, *want);

  size_t bytes = 0;
  ASSERT_C(narrows_detokenize(tiny().c.get(), tokens.data(), n, 0, nullptr, 0, &bytes));
  EXPECT_EQ(bytes, text.size());
  std::string back(bytes + 1, 'x');
  EXPECT_EQ(narrows_detokenize(tiny().c.get(), tokens.data(), n, 0, back.data(), bytes, &bytes),
            NARROWS_BUFFER_TOO_SMALL)
      << "no room for the zero byte";
  ASSERT_C(narrows_detokenize(tiny().c.get(), tokens.data(), n, 0, back.data(), bytes + 1, &bytes));
  EXPECT_EQ(back, text + '\0');

  const Token impossible[] = {-1, 1 << 30};
  EXPECT_C(narrows_detokenize(tiny().c.get(), impossible, 2, 1, back.data(), back.size(), &bytes));
  EXPECT_EQ(bytes, 0U);
  EXPECT_EQ(narrows_is_end(tiny().c.get(), 256), 1);
  EXPECT_EQ(narrows_is_end(tiny().c.get(), 'a'), 0);
}

TEST(CApi, ConversationsGoThroughTheTemplate) {
  const narrows_chat_message c[] = {{"system", "Be brief."}, {"user", "Hi <|im_end|>"}};
  const std::vector<ChatMessage> cpp = {{"system", "Be brief."}, {"user", "Hi <|im_end|>"}};
  const Tokenizer& tokenizer = tiny().cpp.model->tokenizer();
  const auto rendered = tokenizer.apply_chat_template(cpp, true);
  ASSERT_TRUE(rendered.ok());
  std::string text(4096, '\0');
  size_t n = 0;
  ASSERT_C(narrows_chat_render(tiny().c.get(), c, 2, 1, text.data(), text.size(), &n));
  EXPECT_EQ(text.substr(0, n), rendered->text);
  std::vector<Token> tokens(4096);
  ASSERT_C(narrows_chat_tokenize(tiny().c.get(), c, 2, 1, tokens.data(), tokens.size(), &n));
  tokens.resize(n);
  EXPECT_EQ(tokens, *tokenizer.encode(*rendered));
}

TEST(CApi, SavedSessionsGoOn) {
  const TempDir dir;
  const std::string path = dir.path("a.session");
  const auto tokens = random_tokens(900);
  const CSession first = c_session(c_options("klt"));
  c_prefill(first.get(), tokens);
  ASSERT_C(narrows_session_save(first.get(), tokens.data(), tokens.size(), path.c_str()));
  const narrows_session_options o = c_options("f16");
  narrows_session* made = nullptr;
  ASSERT_C(narrows_session_load(tiny().c.get(), &o, path.c_str(), &made));
  const CSession second(made);
  size_t n = 0;
  std::vector<Token> saved(900);
  ASSERT_C(narrows_session_saved_tokens(second.get(), saved.data(), saved.size(), &n));
  EXPECT_EQ(n, 900U);
  EXPECT_EQ(saved, tokens);
  EXPECT_EQ(c_greedy(second.get(), 10), c_greedy(first.get(), 10));
  EXPECT_EQ(c_logits(second.get()), c_logits(first.get()));
  ASSERT_C(narrows_session_saved_tokens(first.get(), nullptr, 0, &n));
  EXPECT_EQ(n, 0U);
}

TEST(CApi, APromptInPiecesAndOneThatIsGivenUp) {
  const auto tokens = random_tokens(900);
  const CSession whole = c_session(c_options());
  c_prefill(whole.get(), tokens);
  const CSession pieces = c_session(c_options());
  ASSERT_C(narrows_session_begin_prefill(pieces.get(), tokens.data(), tokens.size()));
  EXPECT_LT(narrows_session_prefill_done(pieces.get()), 1);
  expect_refused(narrows_session_decode(pieces.get(), 1), NARROWS_INTERNAL, "still reading");
  while (narrows_session_prefill_done(pieces.get()) < 1) ASSERT_C(narrows_session_prefill_step(pieces.get()));
  EXPECT_EQ(c_logits(pieces.get()), c_logits(whole.get()));

  struct Seen {
    int calls = 0;
    double last = 0;
  } seen;
  const narrows_progress cancel = [](double done, void* user) {
    auto* s = static_cast<Seen*>(user);
    s->last = done;
    return ++s->calls < 2 ? 1 : 0;
  };
  const CSession c = c_session(c_options());
  expect_refused(narrows_session_prefill(c.get(), tokens.data(), tokens.size(), cancel, &seen),
                 NARROWS_CANCELLED, "cancelled");
  EXPECT_EQ(seen.calls, 2);
  EXPECT_LT(seen.last, 1);
  expect_refused(narrows_session_decode(c.get(), 1), NARROWS_INTERNAL, "must be reset");
  ASSERT_C(narrows_session_reset(c.get()));
  c_prefill(c.get(), tokens);
  EXPECT_EQ(c_logits(c.get()), c_logits(whole.get()));
}

TEST(CApi, GoingBackAndSharingABeginning) {
  const auto tokens = random_tokens(1200);
  narrows_session_options o = c_options("kivi-4");
  o.segments = 1;
  const CSession a = c_session(o), b = c_session(o);
  c_prefill(a.get(), tokens);
  const int64_t n = narrows_session_kept_prefix(a.get(), 1200);
  ASSERT_GT(n, 0);
  ASSERT_C(narrows_session_share_prefix(b.get(), a.get(), n));
  EXPECT_EQ(narrows_session_n_past(b.get()), n);
  c_prefill(b.get(), std::span(tokens).subspan(static_cast<size_t>(n)));
  EXPECT_EQ(c_logits(b.get()), c_logits(a.get()));
  expect_refused(narrows_session_share_prefix(b.get(), a.get(), n + 1), NARROWS_INVALID_ARGUMENT, "segment");

  int64_t left = -1;
  ASSERT_C(narrows_session_go_back(a.get(), 1100, &left));
  EXPECT_EQ(left, n);
  ASSERT_C(narrows_session_go_back(a.get(), -5, nullptr));
  EXPECT_EQ(narrows_session_n_past(a.get()), 0);
}

TEST(CApi, SamplersDrawAsThoseOfCpp) {
  auto session = make_session(tiny().cpp.model);
  const auto prompt = random_tokens(50);
  ASSERT_OK(session->prefill(prompt));
  SamplerOptions want;
  want.temperature = 1.5F;
  want.top_k = 100;
  want.top_p = 0.9F;
  want.min_p = 0.001F;
  want.repeat_penalty = 1.3F;
  want.presence_penalty = 0.5F;
  want.frequency_penalty = 0.25F;
  want.repeat_last_n = 30;
  want.seed = 12345;
  want.logit_bias = {{'a', -std::numeric_limits<float>::infinity()}, {'b', 3}};
  auto cpp = Sampler::create(want, &tiny().cpp.model->tokenizer());
  ASSERT_TRUE(cpp.ok());

  const narrows_logit_bias bias[] = {{'a', -std::numeric_limits<float>::infinity()}, {'b', 3}};
  narrows_sampler_options o;
  narrows_sampler_options_init(&o);
  EXPECT_EQ(o.temperature, SamplerOptions().temperature);
  EXPECT_EQ(o.top_k, SamplerOptions().top_k);
  EXPECT_EQ(o.top_p, SamplerOptions().top_p);
  EXPECT_EQ(o.min_p, SamplerOptions().min_p);
  EXPECT_EQ(o.repeat_penalty, 1);
  EXPECT_EQ(o.repeat_last_n, SamplerOptions().repeat_last_n);
  o.temperature = 1.5F;
  o.top_k = 100;
  o.top_p = 0.9F;
  o.min_p = 0.001F;
  o.repeat_penalty = 1.3F;
  o.presence_penalty = 0.5F;
  o.frequency_penalty = 0.25F;
  o.repeat_last_n = 30;
  o.seed = 12345;
  o.logit_bias = bias;
  o.n_logit_bias = 2;
  narrows_sampler* made = nullptr;
  ASSERT_C(narrows_sampler_create(tiny().c.get(), &o, &made));
  const CSampler c(made);
  for (const Token t : prompt) {
    (*cpp)->accept_prompt(t);
    EXPECT_C(narrows_sampler_accept_prompt(c.get(), t));
  }
  std::vector<Token> got, expected;
  for (int i = 0; i < 40; ++i) {
    const auto a = (*cpp)->sample(session->logits());
    ASSERT_TRUE(a.ok());
    Token b = -1;
    ASSERT_C(narrows_sampler_sample(c.get(), session->logits().data(), session->logits().size(), &b));
    (*cpp)->accept(*a);
    ASSERT_C(narrows_sampler_accept(c.get(), b));
    expected.push_back(*a);
    got.push_back(b);
  }
  EXPECT_EQ(got, expected);
  EXPECT_GT(std::set<Token>(got.begin(), got.end()).size(), 5U) << "draws, not one token again and again";
}

TEST(CApi, GrammarsHoldTheAnswer) {
  narrows_sampler_options o;
  narrows_sampler_options_init(&o);
  o.temperature = 0;
  o.grammar = "root ::= \"yes\" | \"no\"";
  narrows_sampler* made = nullptr;
  ASSERT_C(narrows_sampler_create(tiny().c.get(), &o, &made));
  const CSampler c(made);
  const CSession session = c_session(c_options());
  c_prefill(session.get(), random_tokens(20));
  std::string text;
  for (int i = 0; i < 5; ++i) {
    const auto logits = c_logits(session.get());
    Token t = -1;
    ASSERT_C(narrows_sampler_sample(c.get(), logits.data(), logits.size(), &t));
    if (narrows_is_end(tiny().c.get(), t) != 0) break;
    text += static_cast<char>(t);
    ASSERT_C(narrows_sampler_accept(c.get(), t));
    ASSERT_C(narrows_session_decode(session.get(), t));
  }
  EXPECT_TRUE(text == "yes" || text == "no") << text;
}

TEST(CApi, SessionsThatStepTogether) {
  const auto tokens = random_tokens(64);
  std::vector<CSession> together, alone;
  std::vector<narrows_session*> pointers;
  for (size_t i = 0; i < 3; ++i) {
    for (auto* list : {&together, &alone}) {
      list->push_back(c_session(c_options(i == 1 ? "kivi-4" : "f16")));
      c_prefill(list->back().get(), std::span(tokens).first(20 + 10 * i));
    }
    pointers.push_back(together.back().get());
  }
  narrows_batch* made = nullptr;
  ASSERT_C(narrows_batch_create(tiny().c.get(), 4, 1, &made));
  const CBatch batch(made);
  const Token next[] = {3, 4, 5};
  narrows_status each[3];
  for (int step = 0; step < 5; ++step) {
    ASSERT_C(narrows_batch_decode(batch.get(), pointers.data(), next, 3, each));
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(each[i], NARROWS_OK);
      EXPECT_STREQ(narrows_batch_error(batch.get(), i), "");
      ASSERT_C(narrows_session_decode(alone[i].get(), next[i]));
      EXPECT_EQ(c_logits(pointers[i]), c_logits(alone[i].get()));
    }
  }
  pointers[2] = pointers[0];
  ASSERT_C(narrows_batch_decode(batch.get(), pointers.data(), next, 3, each));
  EXPECT_EQ(each[0], NARROWS_OK);
  EXPECT_EQ(each[2], NARROWS_INVALID_ARGUMENT);
  EXPECT_NE(std::string(narrows_batch_error(batch.get(), 2)).find("twice"), std::string::npos);
  EXPECT_STREQ(narrows_batch_error(batch.get(), 99), "");
  expect_refused(narrows_batch_decode(batch.get(), pointers.data(), next, 5, each), NARROWS_INVALID_ARGUMENT,
                 "more sessions");
}

TEST(CApi, HandlesAreFreedInAnyOrder) {
  narrows_model* model = nullptr;
  ASSERT_C(narrows_model_load(tiny().cpp.path.c_str(), nullptr, &model));
  const narrows_session_options o = c_options();
  narrows_sampler_options so;
  narrows_sampler_options_init(&so);
  so.grammar = "root ::= [a-z]*";
  narrows_session* session = nullptr;
  narrows_sampler* sampler = nullptr;
  ASSERT_C(narrows_session_create(model, &o, &session));
  ASSERT_C(narrows_sampler_create(model, &so, &sampler));
  narrows_model_free(model);
  c_prefill(session, random_tokens(10));
  const auto logits = c_logits(session);
  narrows_session_free(session);
  Token t = -1;
  EXPECT_C(narrows_sampler_sample(sampler, logits.data(), logits.size(), &t));
  EXPECT_TRUE(t >= 'a' && t <= 'z') << t;
  narrows_sampler_free(sampler);
}

}  // namespace
}  // namespace narrows::testing
