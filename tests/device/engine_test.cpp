// The engine on a device, where the device is the host's memory (host_device.h): models, caches, batches and
// saved sessions give what they give on the CPU; a device that has no room or goes away ends in a sentence.
#include <gtest/gtest.h>
#include <unistd.h>

#include "device/host_device.h"
#include "device/library.h"
#include "engine/model_parts.h"
#include "narrows/session_file.h"
#include "support/session.h"
#include "support/tiny_cases.h"

namespace narrows::testing {
namespace {

/// Of queries and mixed rows in f16: 2^-11 of scores of size 5 or so, and logits are as large.
constexpr double kRounding = 2e-2;

LoadOptions on(const char* device) {
  LoadOptions options;
  options.device = device;
  return options;
}

/// Heads of 64, so that an f16 cache lies on the device.
TinyModel wide_model() {
  TinyModel m;
  m.n_embd = 128;
  m.n_head = 2;
  m.n_head_kv = 1;
  m.head_dim = 64;
  return m;
}

/// A prompt is multiplied as steps are: nothing but the order of sums is the GPU's own.
const SessionSetup kOnDevice = {.prompt = {PrefillProducts::int8, PrefillAttention::automatic}};

using Rows = std::vector<std::vector<float>>;

Rows answers(Session& s, int64_t n_prompt, int64_t n_step) {
  const std::vector<Token> tokens = random_tokens(n_prompt + n_step);
  const auto all = std::span<const Token>(tokens);
  const Status prompt = s.prefill(all.first(static_cast<size_t>(n_prompt)));
  EXPECT_TRUE(prompt.ok()) << prompt.message();
  Rows rows = {copy(s.logits())};
  for (const auto& row : decode_all(s, all.last(static_cast<size_t>(n_step)))) rows.push_back(row);
  return rows;
}

class OnDevice : public ::testing::Test {
 protected:
  const WithHostDevice with_;
};

TEST_F(OnDevice, EveryModelGivesWhatItGivesOnTheCpu) {
  std::vector<TinyCase> cases = all_cases();
  int64_t n_run = 0;
  for (const TinyCase& c : cases) {
    const TempDir dir;
    const std::string path = c.model.write(dir.path("tiny.gguf"));
    const auto there = Model::load(path, on("cuda"));
    if (!there.ok()) {
      EXPECT_EQ(there.status().code(), StatusCode::unsupported) << c.name;
      EXPECT_NE(there.status().message().find("--device cpu"), std::string::npos) << there.status().message();
      const auto instead = Model::load(path, on("auto"));
      ASSERT_TRUE(instead.ok()) << c.name;
      EXPECT_EQ((*instead)->info().device, "");
      continue;
    }
    EXPECT_EQ((*there)->info().device, "cuda:0 (no card)");
    const auto here = Model::load(path);
    for (const char* kv : {"f16", "klt"}) {
      // An f16 cache of such heads is on the device; all others are the host's, which attends as on the CPU.
      const bool there_too = c.model.head_dim == 64 || c.model.head_dim == 128;
      SessionSetup setup = {.kv = kv};
      const Rows b = answers(*make_session(*here, setup), 21, 4);
      if (there_too && setup.kv == "f16") setup.prompt = kOnDevice.prompt;
      const Rows a = answers(*make_session(*there, setup), 21, 4);
      if (c.float_weights) {
        EXPECT_LT(max_difference(a, b), 1e-3) << c.name << " " << kv;
        continue;
      }
      // Bytes that round the other way are noise of the size that bytes have.
      for (size_t i = 0; i < a.size(); ++i)
        EXPECT_LT(kl_divergence(a[i], b[i]), 2e-2) << c.name << " " << kv << " " << i;
    }
    ++n_run;
  }
  EXPECT_GT(n_run, 20);
}

TEST_F(OnDevice, AnF16CacheLiesThere) {
  const LoadedTiny here(wide_model()), there(wide_model(), on("cuda"));
  for (const int64_t n : {1, 63, 64, 65, 200, 700}) {
    const auto a = make_session(there.model, kOnDevice), b = make_session(here.model, {});
    const Rows x = answers(*a, n, 70), y = answers(*b, n, 70);
    EXPECT_LT(max_difference(x, y), kRounding) << n;
    EXPECT_EQ(a->cache_stats().bytes, (n + 70 + 63) / 64 * 64 * 2 * 64 * 2 * 2);
  }
}

TEST_F(OnDevice, WhatOnlyTheCpuDoesIsRefused) {
  const LoadedTiny there(wide_model(), on("cuda"));
  SessionOptions options;
  options.prompt.attention = PrefillAttention::pasa;
  EXPECT_EQ(Session::create(there.model, options).status().code(), StatusCode::unsupported);
  options.prompt = PromptOptions();
  options.prompt.mass = 0.9;
  EXPECT_EQ(Session::create(there.model, options).status().code(), StatusCode::unsupported);
  options.kv = kv("klt");
  EXPECT_TRUE(Session::create(there.model, options).ok());
}

TEST_F(OnDevice, LongPromptsAreMultipliedInBf16) {
  const LoadedTiny here(wide_model()), there(wide_model(), on("cuda"));
  SessionSetup setup;
  setup.prompt = {PrefillProducts::bf16, PrefillAttention::automatic};
  const Rows x = answers(*make_session(there.model, setup), 300, 3);
  const Rows y = answers(*make_session(here.model, {}), 300, 3);
  EXPECT_GT(max_difference(x, y), 1e-6);
  EXPECT_LT(max_difference(x, y), 0.3);
}

TEST_F(OnDevice, ABatchGivesTheBitsOfSingleSteps) {
  const LoadedTiny there(wide_model(), on("cuda"));
  auto batch = DecodeBatch::create(there.model, 3, 1);
  ASSERT_TRUE(batch.ok());
  SessionsTwice sessions({random_tokens(3), random_tokens(70), random_tokens(130)},
                         [&] { return make_session(there.model, kOnDevice); });
  for (const Token t : random_tokens(5))
    ASSERT_NO_FATAL_FAILURE(sessions.step(**batch, std::vector<Token>(3, t)));
}

TEST_F(OnDevice, ItGoesBackAndSharesItsBeginning) {
  const LoadedTiny there(wide_model(), on("cuda"));
  const SessionSetup segments = {.prompt = kOnDevice.prompt, .segments = true};
  const auto a = make_session(there.model, segments), b = make_session(there.model, segments);
  const std::vector<Token> tokens = random_tokens(700);
  const auto all = std::span<const Token>(tokens);
  ASSERT_OK(a->prefill(all));
  const Rows whole = {copy(a->logits())};
  const int64_t kept = a->kept_prefix(600);
  ASSERT_GT(kept, 0);
  ASSERT_OK(b->share_prefix(*a, kept));
  ASSERT_OK(b->prefill(all.subspan(static_cast<size_t>(kept))));
  EXPECT_LT(max_difference(whole, Rows{copy(b->logits())}), kRounding);
  // Whoever goes on alone changes nothing of the other's.
  ASSERT_OK(a->decode(5));
  const auto before = copy(a->logits());
  EXPECT_EQ(a->go_back(kept), kept);
  for (const Token t : random_tokens(40)) ASSERT_OK(b->decode(t));
  ASSERT_OK(a->prefill(all.subspan(static_cast<size_t>(kept))));
  ASSERT_OK(a->decode(5));
  EXPECT_LT(max_difference(Rows{before}, Rows{copy(a->logits())}), kRounding);
}

TEST_F(OnDevice, SavedSessionsGoOnElsewhere) {
  const LoadedTiny here(wide_model()), there(wide_model(), on("cuda"));
  const TempDir dir;
  const std::string path = dir.path("a.session");
  const std::vector<Token> tokens = random_tokens(150);
  for (const bool moves_there : {false, true}) {
    const auto& from = moves_there ? here.model : there.model;
    const auto& to = moves_there ? there.model : here.model;
    const auto a = make_session(from, kOnDevice);
    ASSERT_OK(a->prefill(tokens));
    ASSERT_OK(save_session(*a, tokens, path));
    SessionOptions options;
    options.n_threads = 1;
    const auto b = load_session(to, options, path);
    ASSERT_TRUE(b.ok()) << b.status().message();
    ASSERT_OK(a->decode(9));
    ASSERT_OK(b->session->decode(9));
    EXPECT_LT(max_difference(Rows{copy(a->logits())}, Rows{copy(b->session->logits())}), kRounding);
  }
}

TEST_F(OnDevice, ASessionThatTheCardLostIsNotSaved) {
  const LoadedTiny there(wide_model(), on("cuda"));
  const TempDir dir;
  const std::string path = dir.path("a.session");
  const auto s = make_session(there.model, kOnDevice);
  ASSERT_OK(s->prefill(random_tokens(20)));
  host_device().breaking_call = host_device().n_call;
  EXPECT_EQ(save_session(*s, random_tokens(20), path).code(), StatusCode::internal);
  EXPECT_NE(access(path.c_str(), F_OK), 0);
}

TEST_F(OnDevice, AKeyThatHalfPrecisionCannotHoldIsNamed) {
  TinyModel m = wide_model();
  m.edit_tensors = [](std::vector<TinyTensor>& tensors) {
    for (TinyTensor& t : tensors) {
      if (t.name != "blk.1.attn_v.weight") continue;
      for (float& x : t.data) x *= 1e6F;
    }
  };
  const LoadedTiny there(m, on("cuda"));
  const auto s = make_session(there.model, kOnDevice);
  const Status prompt = s->prefill(random_tokens(10));
  EXPECT_EQ(prompt.code(), StatusCode::non_finite) << prompt.message();
  EXPECT_NE(prompt.message().find("layer 1"), std::string::npos) << prompt.message();
}

/// Loads, reads a prompt, steps; what came of it.
Status whole_run(const std::string& path) {
  const auto model = Model::load(path, on("cuda"));
  if (!model.ok()) return model.status();
  SessionOptions options;
  options.n_threads = 1;
  auto session = Session::create(*model, options);
  if (!session.ok()) return session.status();
  if (Status s = (*session)->prefill(random_tokens(120)); !s.ok()) return s;
  for (const Token t : random_tokens(12)) {
    if (Status s = (*session)->decode(t); !s.ok()) return s;
  }
  return {};
}

TEST_F(OnDevice, NoRoomAtAnyAllocationIsASentence) {
  const TempDir dir;
  const std::string path = wide_model().write(dir.path("tiny.gguf"));
  ASSERT_OK(whole_run(path));
  EXPECT_EQ(host_device().allocated, 0);
  const int64_t n = host_device().n_allocation;
  EXPECT_GT(n, 15);
  for (int64_t i = 0; i < n; ++i) {
    host_device() = HostDevice{};
    host_device().failing = i;
    const Status s = whole_run(path);
    EXPECT_EQ(s.code(), StatusCode::out_of_memory) << i << ": " << s.message();
    EXPECT_NE(s.message().find("GB are needed and"), std::string::npos) << s.message();
    EXPECT_EQ(host_device().allocated, 0) << i;
  }
}

TEST_F(OnDevice, ACardThatGoesAwayIsASentence) {
  const TempDir dir;
  const std::string path = wide_model().write(dir.path("tiny.gguf"));
  ASSERT_OK(whole_run(path));
  const int64_t n = host_device().n_call;
  for (int64_t i = 0; i < n; i += 1 + n / 60) {
    host_device() = HostDevice{};
    host_device().breaking_call = i;
    const Status s = whole_run(path);
    EXPECT_EQ(s.code(), StatusCode::internal) << i;
    EXPECT_NE(s.message().find("the card does not answer"), std::string::npos) << i << ": " << s.message();
    EXPECT_EQ(host_device().allocated, 0) << i;
  }
}

TEST(WithoutADevice, AutoIsTheCpuAndCudaASentence) {
  if (device::load_library().ok()) GTEST_SKIP() << "a library for GPUs is installed here";
  const TempDir dir;
  const std::string path = TinyModel().write(dir.path("tiny.gguf"));
  const auto model = Model::load(path, on("auto"));
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_EQ((*model)->info().device, "");
  const Status s = Model::load(path, on("cuda")).status();
  EXPECT_EQ(s.code(), StatusCode::unsupported);
  EXPECT_NE(s.message().find("there is no libnarrows_cuda.so beside the program"), std::string::npos)
      << s.message();
  EXPECT_EQ(Model::load(path, on("gpu")).status().code(), StatusCode::invalid_argument);
}

TEST_F(OnDevice, AModelTooLargeIsRefusedWithBothFigures) {
  const TempDir dir;
  const std::string path = wide_model().write(dir.path("tiny.gguf"));
  host_device().total_bytes = int64_t{200} << 20;
  const auto model = Model::load(path, on("cuda"));
  EXPECT_EQ(model.status().code(), StatusCode::out_of_memory);
  EXPECT_NE(model.status().message().find("0.21 GB are free"), std::string::npos) << model.status().message();
  EXPECT_TRUE(Model::load(path, on("auto")).ok());
}

}  // namespace
}  // namespace narrows::testing
