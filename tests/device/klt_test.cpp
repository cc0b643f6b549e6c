// klt caches on a device that is the host's memory: they give what the CPU's give, step by step, in batches,
// with shared beginnings and when they move; a device that has no room or goes away ends in a sentence.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "calibrate/key_statistics.h"
#include "device/host_device.h"
#include "engine/session_impl.h"
#include "engine/value_weight.h"
#include "kv/basis_file.h"
#include "narrows/session_file.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

using Rows = std::vector<std::vector<float>>;

/// One KV head of 64, so that 512 tokens are enough for a layer's transforms.
TinyModel small_model() {
  TinyModel m;
  m.n_embd = 128;
  m.n_head = 2;
  m.n_head_kv = 1;
  m.head_dim = 64;
  return m;
}

/// Two parts of four KV heads, groups of two.
TinyModel wide_model() {
  TinyModel m = small_model();
  m.n_head = 16;
  m.n_head_kv = 8;
  return m;
}

LoadOptions on_device() {
  LoadOptions options;
  options.device = "cuda";
  return options;
}

SessionSetup setup(const std::string& kv = "klt", bool segments = false) {
  return {.kv = kv, .prompt = {PrefillProducts::int8, PrefillAttention::automatic}, .segments = segments};
}

Rows prompt_and_steps(Session& s, int64_t n_prompt, int64_t n_step) {
  const std::vector<Token> tokens = random_tokens(n_prompt + n_step);
  const auto all = std::span<const Token>(tokens);
  EXPECT_OK(s.prefill(all.first(static_cast<size_t>(n_prompt))));
  Rows rows = {copy(s.logits())};
  for (auto& row : decode_all(s, all.last(static_cast<size_t>(n_step)))) rows.push_back(std::move(row));
  return rows;
}

double mean_kl(const Rows& a, const Rows& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += kl_divergence(a[i], b[i]);
  return sum / static_cast<double>(a.size());
}

/// Transforms from so many tokens: short prompts are then encoded too.
std::string basis_file(const LoadedTiny& model, int64_t n, const TempDir& dir) {
  const auto basis = calibrate(*model.model, random_tokens(n, 3), "test", 1);
  EXPECT_TRUE(basis.ok()) << basis.status().message();
  if (basis.ok()) EXPECT_OK(write_basis_file(dir.path("basis.gguf"), *basis, model.model->info()));
  return dir.path("basis.gguf");
}

class KltOnDevice : public ::testing::Test {
 protected:
  const WithHostDevice with_;
};

bool lies_there(const Session& s) { return Access::impl(s).cache->place().klt != nullptr; }

/// What a cache costs may differ in the codes that a last bit turns: a small part of what klt itself costs.
TEST_F(KltOnDevice, EveryProfileGivesWhatTheCpuGives) {
  const LoadedTiny here(small_model()), there(small_model(), on_device());
  for (const char* kv : {"klt", "klt-10x", "klt:k=3,v=4,budget=100", "klt:mass=0.9,budget=64,anchors=0",
                         "klt:sinks=0", "klt:k=0.25,v=0.25"}) {
    const auto a = make_session(there.model, setup(kv)), b = make_session(here.model, setup(kv));
    ASSERT_TRUE(lies_there(*a)) << kv;
    const Rows x = prompt_and_steps(*a, 600, 140), y = prompt_and_steps(*b, 600, 140);
    EXPECT_GT(a->cache_stats().bytes_pages, 0) << kv;
    const auto exact = make_session(here.model, setup("f16"));
    const double to_cpu = mean_kl(y, x), of_klt = mean_kl(prompt_and_steps(*exact, 600, 140), y);
    EXPECT_LT(to_cpu, 0.05 * of_klt) << kv;
  }
}

/// Layers of a prompt are encoded by threads of their own, one after the other or beside each other; so is a
/// prompt on top of it, whose first tokens wait in the window.
TEST_F(KltOnDevice, LayersBesideEachOtherGiveTheBitsOfOneAfterAnother) {
  TinyModel m = small_model();
  m.n_layer = 7;
  const LoadedTiny there(m, on_device());
  Rows rows[2];
  for (const int n_threads : {1, 5}) {
    SessionSetup with = setup();
    with.n_threads = n_threads;
    const auto s = make_session(there.model, with);
    Rows& of = rows[n_threads == 1 ? 0 : 1];
    of = prompt_and_steps(*s, 700, 20);
    EXPECT_OK(s->prefill(random_tokens(333, 4)));
    of.push_back(copy(s->logits()));
    for (auto& row : decode_all(*s, random_tokens(3, 5))) of.push_back(std::move(row));
    EXPECT_GT(s->cache_stats().bytes_pages, 0);
  }
  EXPECT_EQ(rows[0], rows[1]);
}

/// The second one's first tokens lie in the window, and are sent back.
TEST_F(KltOnDevice, APromptOnTopOfAnotherGivesWhatTheCpuGives) {
  const LoadedTiny here(small_model()), there(small_model(), on_device());
  const auto a = make_session(there.model, setup()), b = make_session(here.model, setup());
  Rows x, y;
  for (const auto& [s, rows] : {std::pair{a.get(), &x}, std::pair{b.get(), &y}}) {
    *rows = prompt_and_steps(*s, 600, 37);
    for (const int64_t n : {300, 131}) {
      EXPECT_OK(s->prefill(random_tokens(n, static_cast<uint32_t>(n))));
      for (auto& row : decode_all(*s, random_tokens(5, 8))) rows->push_back(std::move(row));
    }
  }
  EXPECT_EQ(a->n_past(), b->n_past());
  EXPECT_LT(mean_kl(y, x), 2e-3);
}

/// Whoever asks between the pieces of a prompt waits for what they have left; who gives up leaves nothing
/// behind.
TEST_F(KltOnDevice, APromptMayBeLookedAtAndGivenUp) {
  TinyModel m = small_model();
  m.n_layer = 7;
  const LoadedTiny there(m, on_device());
  SessionSetup with = setup();
  with.n_threads = 3;
  const auto s = make_session(there.model, with), other = make_session(there.model, with);
  const std::vector<Token> tokens = random_tokens(700);
  for (int n_step = 1; n_step < 7; n_step += 2) {
    int n = 0;
    EXPECT_EQ(s->prefill(tokens, [&](double) { return n++ < n_step; }).code(), StatusCode::cancelled);
    s->reset();
    EXPECT_EQ(s->n_past(), 0);
  }
  ASSERT_OK(s->begin_prefill(tokens));
  while (s->prefill_done() < 1) {
    ASSERT_OK(s->prefill_step());
    EXPECT_GE(s->cache_stats().bytes, 0);
    EXPECT_GE(s->n_past(), 0);
  }
  ASSERT_OK(other->prefill(tokens));
  EXPECT_EQ(copy(s->logits()), copy(other->logits()));
  EXPECT_EQ(decode_all(*s, random_tokens(3)), decode_all(*other, random_tokens(3)));
}

/// The output's matrix as the device has it for a prompt, rounded to bf16.
TEST_F(KltOnDevice, WhatErrorsOfValuesCostIsFoundThereOnce) {
  const LoadedTiny there(wide_model(), on_device());
  SessionSetup with = setup();
  with.prompt.products = PrefillProducts::bf16;
  TinyModel m = wide_model();
  const int64_t n = tokens_for_klt(m.n_head_kv * m.head_dim);
  const ModelParts& parts = parts_of(*there.model);
  ASSERT_OK(make_session(there.model, with)->prefill(random_tokens(n)));
  for (int64_t layer = 0; layer < parts.spec().n_layer(); ++layer) {
    std::vector<double> found, wanted;
    ASSERT_TRUE(parts.value_weights.get(layer, found));
    ASSERT_OK(value_weight(*parts.weights, layer, wanted));
    ASSERT_EQ(found.size(), wanted.size());
    const double largest = *std::max_element(wanted.begin(), wanted.end());
    for (size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], wanted[i], 4e-3 * largest) << i;
  }
}

TEST_F(KltOnDevice, StepsAloneGrowThroughEveryStage) {
  const LoadedTiny here(small_model()), there(small_model(), on_device());
  const auto a = make_session(there.model, setup()), b = make_session(here.model, setup());
  const Rows x = prompt_and_steps(*a, 3, 720), y = prompt_and_steps(*b, 3, 720);
  EXPECT_GT(a->cache_stats().bytes_pages, 0);
  // Until the first layer has its transforms nothing is rounded but to f16.
  for (size_t i = 0; i < 500; ++i) EXPECT_LT(max_difference(x[i], y[i]), 2e-2) << i;
  EXPECT_LT(mean_kl(y, x), 2e-3);
}

TEST_F(KltOnDevice, PartsAndGroups) {
  const LoadedTiny here(wide_model()), there(wide_model(), on_device());
  const TempDir dir;
  SessionSetup with_basis = setup("klt:budget=64");
  with_basis.basis_path = basis_file(here, 1100, dir);
  const auto a = make_session(there.model, with_basis), b = make_session(here.model, with_basis);
  ASSERT_TRUE(lies_there(*a));
  const Rows x = prompt_and_steps(*a, 250, 70), y = prompt_and_steps(*b, 250, 70);
  EXPECT_GT(a->cache_stats().bytes_pages, 0);
  EXPECT_LT(mean_kl(y, x), 1e-2);
}

TEST_F(KltOnDevice, WhatItsKernelsDoNotTakeStaysTheHosts) {
  const LoadedTiny there(small_model(), on_device());
  for (const char* kv : {"klt:budget=all", "klt:sinks=20", "klt:block=16", "kivi-2", "sals-25"}) {
    const auto s = make_session(there.model, setup(kv));
    EXPECT_FALSE(Access::impl(*s).cache->is_on_device()) << kv;
    prompt_and_steps(*s, 200, 3);
  }
}

/// The same pages and exact tokens: nothing but the kernels differs.
TEST_F(KltOnDevice, SavedSessionsGoOnElsewhere) {
  const LoadedTiny here(small_model()), there(small_model(), on_device());
  const TempDir dir;
  const std::string path = dir.path("a.session");
  for (const bool moves_there : {false, true}) {
    for (const int64_t n_step : {0, 77}) {
      const auto a = make_session(moves_there ? here.model : there.model, setup());
      prompt_and_steps(*a, 600, n_step);
      ASSERT_OK(save_session(*a, random_tokens(600 + n_step), path));
      SessionOptions options;
      options.n_threads = 1;
      const auto b = load_session(moves_there ? there.model : here.model, options, path);
      ASSERT_TRUE(b.ok()) << b.status().message();
      EXPECT_EQ(lies_there(*b->session), moves_there);
      for (const Token t : random_tokens(3, 9)) {
        ASSERT_OK(a->decode(t));
        ASSERT_OK(b->session->decode(t));
        // A token at the threshold may be read here and not there.
        EXPECT_LT(max_difference(copy(a->logits()), copy(b->session->logits())), 5e-2) << n_step;
      }
    }
  }
}

TEST_F(KltOnDevice, ABatchGivesTheBitsOfSingleSteps) {
  const LoadedTiny there(small_model(), on_device());
  auto batch = DecodeBatch::create(there.model, 4, 1);
  ASSERT_TRUE(batch.ok());
  SessionsTwice sessions({random_tokens(700), random_tokens(3), random_tokens(70), random_tokens(560)},
                         [&] { return make_session(there.model, setup()); });
  for (const Token t : random_tokens(70))
    ASSERT_NO_FATAL_FAILURE(sessions.step(**batch, std::vector<Token>(4, t)));
  const auto f16 = make_session(there.model, setup("f16"));
  std::vector<Session*> mixed = {sessions.all[0], f16.get()};
  std::vector<Status> each(2);
  ASSERT_OK((*batch)->decode(mixed, std::vector<Token>(2, 1), each));
  EXPECT_OK(each[0]);
  EXPECT_EQ(each[1].code(), StatusCode::invalid_argument);
}

TEST_F(KltOnDevice, ItGoesBackAndSharesItsBeginning) {
  TinyModel m = small_model();
  m.n_ctx = 8192;
  const LoadedTiny here(m), there(m, on_device());
  const std::vector<Token> tokens = random_tokens(2600);
  const auto all = std::span<const Token>(tokens);
  const auto a = make_session(there.model, setup("klt", true)),
             b = make_session(there.model, setup("klt", true));
  const auto cpu = make_session(here.model, setup("klt", true));
  ASSERT_OK(cpu->prefill(all));
  ASSERT_OK(a->prefill(all));
  EXPECT_GT(a->cache_stats().bytes_pages, 0);
  EXPECT_LT(kl_divergence(cpu->logits(), a->logits()), 1e-2);
  const int64_t kept = a->kept_prefix(2400);
  ASSERT_GT(kept, 2064);
  ASSERT_OK(b->share_prefix(*a, kept));
  ASSERT_OK(b->prefill(all.subspan(static_cast<size_t>(kept))));
  EXPECT_LT(max_difference(copy(a->logits()), copy(b->logits())), 2e-2);
  // Whoever goes on alone changes nothing of the other's, and what comes anew takes the place of what went.
  const Rows once = decode_all(*a, random_tokens(70, 5));
  EXPECT_EQ(a->go_back(kept), kept);
  const std::vector<Token> others = random_tokens(300, 6);
  ASSERT_OK(a->prefill(others));
  decode_all(*a, random_tokens(5, 7));
  EXPECT_LT(mean_kl(once, decode_all(*b, random_tokens(70, 5))), 1e-4);
  EXPECT_EQ(a->go_back(kept), kept);
  ASSERT_OK(a->prefill(all.subspan(static_cast<size_t>(kept))));
  EXPECT_LT(mean_kl(once, decode_all(*a, random_tokens(70, 5))), 1e-4);
}

/// What eval asks for: the first sequence's rows of each layer, and what a step has read.
TEST_F(KltOnDevice, AnObserverSeesWhatAStepReads) {
  const LoadedTiny there(small_model(), on_device());
  const auto s = make_session(there.model, setup("klt:budget=64,mass=1"));
  ASSERT_OK(s->prefill(random_tokens(700)));
  Session::Impl& impl = Access::impl(*s);
  int64_t n_seen = 0;
  impl.mixer.observe([&](int64_t layer, const DecodeStep& step) {
    ++n_seen;
    const auto read = impl.cache->layer(layer).last_selection(0);
    ASSERT_TRUE(read.has_value());
    EXPECT_EQ(read->size(), 64U);
    EXPECT_TRUE(std::is_sorted(read->begin(), read->end()));
    for (const int32_t pos : *read) EXPECT_FALSE(impl.cache->layer(layer).always_reads(pos)) << pos;
    EXPECT_TRUE(std::isfinite(step.q[0] + step.k[0] + step.v[0] + step.out[0]));
  });
  ASSERT_OK(s->decode(7));
  EXPECT_EQ(n_seen, 2);
}

/// A step is a graph that serves for many steps; whoever observes gets the same numbers without one.
TEST_F(KltOnDevice, StepsAreGraphsThatServeAgain) {
  const LoadedTiny there(small_model(), on_device());
  for (const char* kv : {"f16", "klt"}) {
    const auto a = make_session(there.model, setup(kv)), b = make_session(there.model, setup(kv));
    for (Session* s : {a.get(), b.get()}) ASSERT_OK(s->prefill(random_tokens(700)));
    const int64_t before = host_device().n_graph;
    const Rows x = decode_all(*a, random_tokens(70));
    EXPECT_GE(host_device().n_graph - before, 1) << kv;
    EXPECT_LE(host_device().n_graph - before, 4) << kv;
    int64_t n_seen = 0;
    Access::impl(*b).mixer.observe([&](int64_t, const DecodeStep&) { ++n_seen; });
    const int64_t then = host_device().n_graph;
    EXPECT_EQ(x, decode_all(*b, random_tokens(70))) << kv;
    EXPECT_EQ(host_device().n_graph, then);
    EXPECT_EQ(n_seen, 140);
  }
}

TEST_F(KltOnDevice, AKeyThatHalfPrecisionCannotHoldIsNamed) {
  TinyModel m = small_model();
  m.edit_tensors = [](std::vector<TinyTensor>& tensors) {
    for (TinyTensor& t : tensors) {
      if (t.name != "blk.1.attn_v.weight") continue;
      for (float& x : t.data) x *= 1e6F;
    }
  };
  const LoadedTiny there(m, on_device());
  const auto s = make_session(there.model, setup());
  const Status prompt = s->prefill(random_tokens(10));
  EXPECT_EQ(prompt.code(), StatusCode::non_finite) << prompt.message();
  EXPECT_NE(prompt.message().find("layer 1"), std::string::npos) << prompt.message();
  s->reset();
  const Status longer = s->prefill(random_tokens(200));  // whose rows stay on the device
  EXPECT_EQ(longer.code(), StatusCode::non_finite) << longer.message();
  EXPECT_NE(longer.message().find("layer 1: token"), std::string::npos) << longer.message();
  s->reset();
  ASSERT_OK(s->decode(1));
  EXPECT_EQ(s->decode(2).code(), StatusCode::non_finite);
  s->reset();
  EXPECT_OK(s->decode(1));
}

/// A prompt that is encoded, steps, one of which encodes a page.
Status whole_run(const LoadedTiny& there, const std::string& basis) {
  SessionOptions options;
  options.n_threads = 1;
  options.kv = testing::kv("klt");
  options.basis_path = basis;
  auto session = Session::create(there.model, options);
  if (!session.ok()) return session.status();
  if (Status s = (*session)->prefill(random_tokens(200)); !s.ok()) return s;
  for (const Token t : random_tokens(70)) {
    if (Status s = (*session)->decode(t); !s.ok()) return s;
  }
  return {};
}

TEST_F(KltOnDevice, NoRoomAndNoAnswerAreSentences) {
  const LoadedTiny here(small_model()), there(small_model(), on_device());
  const TempDir dir;
  const std::string basis = basis_file(here, 600, dir);
  const HostDevice before = host_device();
  ASSERT_OK(whole_run(there, basis));
  const int64_t n = host_device().n_allocation - before.n_allocation,
                n_call = host_device().n_call - before.n_call;
  EXPECT_GT(n, 15);
  for (int64_t i = 0; i < n; ++i) {
    // Whoever meets it may go on: what is there is tried again, and a run says what it could not do.
    host_device().failing = host_device().n_allocation + i;
    const Status s = whole_run(there, basis);
    if (s.ok()) continue;
    EXPECT_EQ(s.code(), StatusCode::out_of_memory) << i << ": " << s.message();
    EXPECT_NE(s.message().find("GB are needed and"), std::string::npos) << s.message();
  }
  host_device().failing = -1;
  ASSERT_OK(whole_run(there, basis));
  for (int64_t i = 0; i < n_call; i += 1 + n_call / 40) {
    host_device().breaking_call = host_device().n_call + i;
    const Status s = whole_run(there, basis);
    EXPECT_EQ(s.code(), StatusCode::internal) << i;
    EXPECT_NE(s.message().find("the card does not answer"), std::string::npos) << i << ": " << s.message();
  }
  host_device().breaking_call = -1;
}

TEST_F(KltOnDevice, ASessionThatTheCardLostIsNotSaved) {
  const LoadedTiny there(small_model(), on_device());
  const TempDir dir;
  const std::string path = dir.path("a.session");
  const auto s = make_session(there.model, setup());
  prompt_and_steps(*s, 20, 3);
  host_device().breaking_call = host_device().n_call;
  EXPECT_EQ(save_session(*s, random_tokens(23), path).code(), StatusCode::internal);
  EXPECT_NE(access(path.c_str(), F_OK), 0);
}

}  // namespace
}  // namespace narrows::testing
