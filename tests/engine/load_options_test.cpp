// What a model may be loaded with or from beside its one file: parts, another RoPE, another chat template.
#include <gtest/gtest.h>

#include "narrows/session_file.h"
#include "peer/llama_peer.h"
#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

using Scaling = RopeOverrides::Scaling;
using Rows = std::vector<std::vector<float>>;

/// Logits after a prompt and some steps.
Rows logits_of(const std::shared_ptr<const Model>& model) {
  auto session = make_session(model);
  const auto tokens = random_tokens(90);
  EXPECT_OK(session->prefill(std::span(tokens).first(70)));
  Rows rows = {copy(session->logits())};
  for (auto& row : decode_all(*session, std::span(tokens).subspan(70))) rows.push_back(std::move(row));
  return rows;
}

Rows logits_of(const TinyModel& m, const LoadOptions& options = {}) {
  return logits_of(LoadedTiny(m, options).model);
}

TEST(LoadOptions, PartsAreTheWhole) {
  for (const char* architecture : {"llama", "qwen3moe"}) {
    TinyModel m;
    m.architecture = architecture;
    m.type = GGML_TYPE_Q8_0;
    if (m.architecture == "qwen3moe") m.n_expert = 4, m.n_used = 2;
    const Rows want = logits_of(m);
    const TempDir dir;
    for (const size_t n : {2, 5}) {
      const auto paths = write_split(m, dir.path("m"), n);
      for (const std::string& path : {paths.front(), paths.back()}) {
        auto loaded = Model::load(path);
        ASSERT_TRUE(loaded.ok()) << loaded.status().message();
        EXPECT_EQ((*loaded)->path(), paths.front());  // which libllama wants
        EXPECT_EQ(max_difference(want, logits_of(*loaded)), 0);
        ASSERT_TRUE(LlamaPeer::create((*loaded)->path(), {.n_ctx = 64, .n_threads = 1}).ok());
      }
    }
  }
}

TinyModel qwen2() {
  TinyModel m;
  m.architecture = "qwen2";
  m.freq_base = 1e6;
  m.n_ctx = 256;
  return m;
}

LoadOptions with_rope(const RopeOverrides& rope) {
  LoadOptions options;
  options.rope = rope;
  return options;
}

// Flags are the file's keys, to the last bit.
TEST(RopeOverride, IsAFileThatSaysSo) {
  TinyModel says = qwen2();
  says.freq_base = 5e5;
  EXPECT_EQ(max_difference(logits_of(says), logits_of(qwen2(), with_rope({.freq_base = 5e5}))), 0);
  says = qwen2();
  says.rope_scaling = "linear";
  says.rope_factor = 4;
  const Rows linear = logits_of(says);
  EXPECT_EQ(max_difference(linear, logits_of(qwen2(), with_rope({.freq_scale = 0.25}))), 0);
  EXPECT_EQ(
      max_difference(linear, logits_of(qwen2(), with_rope({.scaling = Scaling::linear, .freq_scale = 0.25}))),
      0);
  EXPECT_GT(max_difference(linear, logits_of(qwen2())), 1);
  EXPECT_EQ(max_difference(logits_of(says, with_rope({.scaling = Scaling::none})), logits_of(qwen2())), 0);
  says.rope_scaling = "yarn";
  says.n_ctx_orig = 64;
  const Rows yarn = logits_of(says);
  const RopeOverrides flags = {.scaling = Scaling::yarn, .freq_scale = 0.25, .yarn_orig_ctx = 64};
  EXPECT_EQ(max_difference(yarn, logits_of(qwen2(), with_rope(flags))), 0);
  EXPECT_GT(max_difference(yarn, linear), 0.1);
  // A part of the file's YaRN alone.
  TinyModel slow = says;
  slow.edit_metadata = [](gguf_context* g) {
    gguf_set_val_f32(g, "qwen2.rope.scaling.yarn_beta_slow", 2);
    gguf_set_val_f32(g, "qwen2.rope.scaling.yarn_beta_fast", 8);
    gguf_set_val_f32(g, "qwen2.rope.scaling.yarn_ext_factor", 0.5);
  };
  EXPECT_EQ(
      max_difference(
          logits_of(slow),
          logits_of(says, with_rope({.yarn_ext_factor = 0.5, .yarn_beta_slow = 2, .yarn_beta_fast = 8}))),
      0);
}

// libllama with the same parameters; with a window, its RoPE stays the file's.
TEST(RopeOverride, IsLlamaCpps) {
  TinyModel gemma3;
  gemma3.architecture = "gemma3";
  gemma3.n_layer = 4;
  gemma3.window = 24;
  gemma3.window_period = 2;
  const RopeOverrides all[] = {{.freq_base = 2e5},
                               {.freq_scale = 0.5},
                               {.scaling = Scaling::linear, .freq_base = 3e5, .freq_scale = 0.25},
                               {.scaling = Scaling::yarn, .freq_scale = 0.25},
                               {.scaling = Scaling::yarn,
                                .freq_scale = 0.125,
                                .yarn_orig_ctx = 100,
                                .yarn_beta_slow = 2,
                                .yarn_beta_fast = 16},
                               {.scaling = Scaling::yarn, .freq_scale = 0.25, .yarn_ext_factor = 0.5},
                               {.scaling = Scaling::none, .freq_base = 2e4, .freq_scale = 0.25},
                               {.scaling = Scaling::linear, .freq_scale = 0.5, .yarn_attn_factor = 1.2}};
  const std::vector<Token> tokens = random_tokens(150);
  for (const TinyModel& m : {qwen2(), gemma3}) {
    for (const RopeOverrides& rope : all) {
      const LoadedTiny loaded(m, with_rope(rope)), plain(m);
      auto peer = LlamaPeer::create(loaded.path,
                                    {.n_ctx = 256, .n_threads = 1, .flash_attention = false, .rope = rope});
      ASSERT_TRUE(peer.ok()) << peer.status().message();
      auto session = make_session(loaded.model), other = make_session(plain.model);
      ASSERT_OK((*peer)->prefill(tokens));
      ASSERT_OK(session->prefill(tokens));
      ASSERT_OK(other->prefill(tokens));
      const double kl = kl_divergence((*peer)->logits(), session->logits());
      EXPECT_LT(kl, 2e-3);  // its cache is f16
      EXPECT_GT(kl_divergence((*peer)->logits(), other->logits()), 20 * kl);
    }
  }
}

TEST(RopeOverride, AFactorLetsTheContextGrow) {
  const auto n_ctx = [](const RopeOverrides& rope) {
    return LoadedTiny(qwen2(), with_rope(rope)).model->info().n_ctx_train;
  };
  EXPECT_EQ(n_ctx({.scaling = Scaling::yarn, .freq_scale = 0.25}), 1024);
  EXPECT_EQ(n_ctx({.scaling = Scaling::yarn, .freq_scale = 0.25, .yarn_orig_ctx = 100}), 400);
  EXPECT_EQ(n_ctx({.freq_scale = 0.1}), 2560);
  EXPECT_EQ(n_ctx({.freq_base = 1e7}), 256);
  EXPECT_EQ(n_ctx({.freq_scale = 2}), 256);
  EXPECT_EQ(n_ctx({.scaling = Scaling::none, .freq_scale = 0.25}), 256);
}

TEST(RopeOverride, NumbersThatCannotBeAreRefused) {
  const TempDir dir;
  const std::string path = qwen2().write(dir.path("m.gguf"));
  const auto refused = [&](const RopeOverrides& rope, const char* flag) {
    expect_refusal(status_of(Model::load(path, with_rope(rope))), StatusCode::invalid_argument, {flag});
  };
  refused({.freq_base = -1}, "--rope-freq-base");
  refused({.freq_base = std::numeric_limits<double>::quiet_NaN()}, "--rope-freq-base");
  refused({.freq_scale = 1e-9}, "--rope-freq-scale");
  refused({.yarn_orig_ctx = -3}, "--yarn-orig-ctx");
  refused({.yarn_ext_factor = -2}, "--yarn-ext-factor");
  refused({.yarn_attn_factor = 0}, "--yarn-attn-factor");
  refused({.yarn_beta_slow = 1e9}, "--yarn-beta-slow");
  refused({.yarn_beta_fast = -0.5}, "--yarn-beta-fast");
}

// A saved session's keys are turned by its RoPE.
TEST(RopeOverride, SavedSessionsOfAnotherDoNotFit) {
  const LoadedTiny plain(qwen2()), other(qwen2(), with_rope({.freq_base = 5e5})),
      again(qwen2(), with_rope({.freq_base = 5e5}));
  EXPECT_NE(plain.model->info().fingerprint, other.model->info().fingerprint);
  EXPECT_EQ(other.model->info().fingerprint, again.model->info().fingerprint);
  const TempDir dir;
  auto session = make_session(other.model);
  const auto tokens = random_tokens(40);
  ASSERT_OK(session->prefill(tokens));
  ASSERT_OK(save_session(*session, tokens, dir.path("s")));
  EXPECT_FALSE(load_session(plain.model, {}, dir.path("s")).ok());
  EXPECT_TRUE(load_session(again.model, {}, dir.path("s")).ok());
}

TEST(LoadOptions, ChatTemplateInPlaceOfTheFiles) {
  LoadOptions options;
  options.chat_template = {"{{ messages[0].content }}|{{ tone }}", {{"tone", "\"kind\""}}};
  const LoadedTiny loaded(TinyModel(), options);
  const ChatMessage message = {"user", "hi"};
  EXPECT_EQ(loaded.model->tokenizer().apply_chat_template({&message, 1}, true)->text, "hi|kind");
  options.chat_template = {"{% for", {}};
  const TempDir dir;
  expect_refusal(status_of(Model::load(TinyModel().write(dir.path("m.gguf")), options)),
                 StatusCode::invalid_argument, {"chat template", "cannot be read"});
}

TEST(LoadOptions, AMissingPreTokenizerIsWarnedOf) {
  EXPECT_TRUE(LoadedTiny(TinyModel()).model->info().warnings.empty());
  TinyModel m;
  m.edit_metadata = [](gguf_context* g) { gguf_remove_key(g, "tokenizer.ggml.pre"); };
  const std::vector<std::string> warnings = LoadedTiny(m).model->info().warnings;
  ASSERT_EQ(warnings.size(), 1U);
  EXPECT_NE(warnings[0].find("tokenizer.ggml.pre is missing"), std::string::npos);
}

}  // namespace
}  // namespace narrows::testing
