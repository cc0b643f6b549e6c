// Spec: what the metadata means, and every key missing, of a wrong type or with an impossible number.
#include "model/spec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/refusal.h"
#include "support/tiny_model.h"
#include "temp_dir.h"
#include "text/llama_log.h"

namespace narrows::testing {
namespace {

Result<ModelSpec> read(const TinyModel& m) {
  silence_llama_log();
  const TempDir dir;
  auto file = GgufFile::open(m.write(dir.path("m.gguf")));
  if (!file.ok()) return file.status();
  return read_spec(*file);
}

ModelSpec good(const TinyModel& m) {
  auto hp = read(m);
  EXPECT_TRUE(hp.ok()) << hp.status().message();
  return hp.ok() ? *hp : ModelSpec();
}

/// A tiny model whose metadata is changed last.
TinyModel with(const std::function<void(gguf_context*)>& edit) {
  TinyModel m;
  m.edit_metadata = edit;
  return m;
}

void refused(const std::function<void(gguf_context*)>& edit, const std::vector<std::string>& words,
             StatusCode code = StatusCode::invalid_file) {
  std::vector<std::string> all = {"m.gguf"};
  all.insert(all.end(), words.begin(), words.end());
  expect_refusal(status_of(read(with(edit))), code, all);
}

// --- meaning
// ------------------------------------------------------------------------------------------------------

TEST(Spec, OfATinyModel) {
  const ModelSpec hp = good(TinyModel());
  EXPECT_EQ(hp.architecture, "llama");
  EXPECT_EQ(hp.name, "tiny");
  EXPECT_EQ(hp.n_layer(), 2);
  EXPECT_EQ(hp.n_embd, 64);
  EXPECT_EQ(hp.layers.at(0).ffn.n_ff, 128);
  EXPECT_EQ(hp.layers.at(0).attention.n_head, 4);
  EXPECT_EQ(hp.layers.at(0).attention.n_head_kv, 2);
  EXPECT_EQ(hp.layers.at(0).attention.head_dim, 16);
  EXPECT_EQ(hp.n_vocab, kTinyVocab);
  EXPECT_EQ(hp.n_ctx_train, 2048);
  EXPECT_FLOAT_EQ(hp.rms_eps, 1e-5F);
  EXPECT_FLOAT_EQ(hp.layers.at(0).attention.scale, 0.25F);
  EXPECT_TRUE(hp.rope_neighbours);
  EXPECT_FALSE(hp.layers.at(1).attention.qk_norm);
  EXPECT_EQ(hp.ropes.at(0).n_rot, 16);
  EXPECT_EQ(hp.ropes.at(0).freq_base, 10000);
  EXPECT_EQ(hp.ropes.at(0).freq_scale, 1);
  EXPECT_EQ(hp.ropes.at(0).ext_factor, 0);
  EXPECT_EQ(hp.ropes.at(0).attn_factor, 1);
}

TEST(Spec, OfTheOtherArchitectures) {
  TinyModel m;
  m.architecture = "qwen2";
  EXPECT_FALSE(good(m).rope_neighbours);
  EXPECT_FALSE(good(m).layers.at(0).attention.qk_norm);
  m.architecture = "qwen3";
  m.head_dim = 32;
  const ModelSpec hp = good(m);
  EXPECT_FALSE(hp.rope_neighbours);
  EXPECT_TRUE(hp.layers.at(1).attention.qk_norm);
  EXPECT_EQ(hp.layers.at(0).attention.head_dim, 32);
  EXPECT_EQ(hp.ropes.at(0).n_rot, 32);
}

TinyModel with_experts(const std::string& architecture = "qwen3moe") {
  TinyModel m;
  m.architecture = architecture;
  m.n_ff = 48;
  m.n_expert = 8;
  m.n_used = 3;
  return m;
}

TEST(Spec, Experts) {
  EXPECT_FALSE(good(TinyModel()).layers.at(0).ffn.experts);
  TinyModel m = with_experts();
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_u32(g, "qwen3moe.feed_forward_length", 600); };
  const FfnSpec ffn = good(m).layers.at(1).ffn;
  EXPECT_EQ(ffn.experts.n_expert, 8);
  EXPECT_EQ(ffn.experts.n_used, 3);
  EXPECT_TRUE(ffn.experts.normalised);
  EXPECT_EQ(ffn.experts.scale, 1);
  EXPECT_EQ(ffn.n_ff, 48);
  EXPECT_TRUE(good(m).layers.at(1).attention.qk_norm);
  // The share of an expert, where the file says what all of a token's have together.
  m.edit_metadata = [](gguf_context* g) {
    gguf_set_val_u32(g, "qwen3moe.feed_forward_length", 600);
    gguf_remove_key(g, "qwen3moe.expert_feed_forward_length");
  };
  EXPECT_EQ(good(m).layers.at(0).ffn.n_ff, 200);
  m = with_experts("llama");
  m.edit_metadata = [](gguf_context* g) {
    gguf_remove_key(g, "llama.expert_feed_forward_length");
    gguf_set_val_f32(g, "llama.expert_weights_scale", 2.5);
  };
  EXPECT_EQ(good(m).layers.at(0).ffn.n_ff, 48);
  EXPECT_EQ(good(m).layers.at(0).ffn.experts.scale, 2.5F);
}

TEST(Spec, DefaultsOfKeysThatMayBeMissing) {
  const ModelSpec hp = good(with([](gguf_context* g) {
    for (const char* key : {"general.name", "llama.attention.head_count_kv", "llama.rope.freq_base"})
      gguf_remove_key(g, key);
  }));
  EXPECT_EQ(hp.name, "");
  EXPECT_EQ(hp.layers.at(0).attention.n_head_kv, 4);
  EXPECT_EQ(hp.ropes.at(0).freq_base, 10000);
}

TEST(Spec, RopeScaling) {
  TinyModel linear;
  linear.rope_scaling = "linear";
  linear.rope_factor = 4;
  EXPECT_EQ(good(linear).ropes.at(0).freq_scale, 0.25);
  EXPECT_EQ(good(linear).ropes.at(0).ext_factor, 0);
  linear.rope_scaling = "none";
  EXPECT_EQ(good(linear).ropes.at(0).freq_scale, 1);
  linear.rope_scaling = "";  // a factor alone is linear
  EXPECT_EQ(good(linear).ropes.at(0).freq_scale, 0.25);
  // The old key.
  EXPECT_EQ(good(with([](gguf_context* g) { gguf_set_val_f32(g, "llama.rope.scale_linear", 2); }))
                .ropes.at(0)
                .freq_scale,
            0.5);

  TinyModel yarn;
  yarn.rope_scaling = "yarn";
  yarn.rope_factor = 4;
  yarn.n_ctx_orig = 512;
  const kernels::RopeParams plain = good(yarn).ropes.at(0);
  EXPECT_EQ(plain.freq_scale, 0.25);
  EXPECT_EQ(plain.ext_factor, 1);
  EXPECT_EQ(plain.attn_factor, 1);
  EXPECT_EQ(plain.beta_fast, 32);
  EXPECT_EQ(plain.beta_slow, 1);
  EXPECT_EQ(plain.n_ctx_orig, 512);
  yarn.edit_metadata = [](gguf_context* g) {
    gguf_set_val_f32(g, "llama.rope.scaling.yarn_ext_factor", 0.5);
    gguf_set_val_f32(g, "llama.rope.scaling.attn_factor", 2);
    gguf_set_val_f32(g, "llama.rope.scaling.yarn_attn_factor", 3);
    gguf_set_val_f32(g, "llama.rope.scaling.yarn_beta_fast", 16);
    gguf_set_val_f32(g, "llama.rope.scaling.yarn_beta_slow", 2);
    gguf_set_val_f32(g, "llama.rope.scaling.yarn_log_multiplier", 0.5);
  };
  const kernels::RopeParams full = good(yarn).ropes.at(0);
  EXPECT_EQ(full.ext_factor, 0.5);
  EXPECT_NEAR(full.attn_factor, 2.0 * 3.0 / (1 + 0.1 * 0.5 * std::log(4.0)), 1e-12);
  EXPECT_EQ(full.beta_fast, 16);
  EXPECT_EQ(full.beta_slow, 2);
}

TEST(Spec, AttentionScale) {
  TinyModel m;
  m.attention_scale = 0.5;
  EXPECT_FLOAT_EQ(good(m).layers.at(0).attention.scale, 0.5F);
}

TEST(Spec, NumbersMayBeOfAnyWholeOrRealType) {
  const ModelSpec hp = good(with([](gguf_context* g) {
    gguf_set_val_u64(g, "llama.block_count", 2);
    gguf_set_val_i64(g, "llama.embedding_length", 64);
    gguf_set_val_u16(g, "llama.attention.head_count", 4);
    gguf_set_val_f64(g, "llama.rope.freq_base", 5e5);
  }));
  EXPECT_EQ(hp.n_embd, 64);
  EXPECT_EQ(hp.ropes.at(0).freq_base, 5e5);
}

TinyModel hybrid(const std::function<void(gguf_context*)>& edit = {}) {
  TinyModel m;
  m.architecture = "qwen35";
  m.n_layer = 8;
  m.attends_in = 4;
  m.n_rot = 12;
  m.edit_metadata = edit;
  return m;
}

TEST(Spec, LayersOfGatedDeltaNet) {
  const ModelSpec spec = good(hybrid());
  EXPECT_EQ(spec.n_layer(), 8);
  EXPECT_EQ(spec.n_recurrent(), 6);
  EXPECT_EQ(&spec.attention(), &spec.layer(3).attention);
  const LayerSpec &delta = spec.layer(2), &attends = spec.layer(7);
  EXPECT_EQ(delta.delta_net, (DeltaNetSpec{2, 4, 16, 4, false}));
  EXPECT_EQ(delta.delta_net.n_row(), 2 * 32 + 64 + 64 + 4 + 4);
  EXPECT_EQ(delta.delta_net.key_head(3), 1);
  EXPECT_EQ(delta.delta_net.key_head(2), 0);
  EXPECT_EQ(delta.attention.n_head, 0);
  EXPECT_FALSE(delta.attention.output_gate);
  EXPECT_TRUE(attends.attention.output_gate);
  EXPECT_TRUE(attends.attention.qk_norm);
  EXPECT_FALSE(attends.delta_net);
  EXPECT_TRUE(attends.ffn_norm_is_post_attention);
  EXPECT_EQ(spec.ropes.front().n_rot, 12);
  EXPECT_EQ(spec.n_layer_unused, 0);

  TinyModel next = hybrid();
  next.architecture = "qwen3next";
  next.n_expert = 4;
  next.n_used = 2;
  next.n_shared_ff = 24;
  next.n_nextn = 2;
  next.edit_metadata = [](gguf_context* g) { gguf_remove_key(g, "qwen3next.feed_forward_length"); };
  const ModelSpec grouped = good(next);
  EXPECT_EQ(grouped.n_layer(), 8);
  EXPECT_EQ(grouped.n_layer_unused, 2);
  EXPECT_EQ(grouped.layer(0).delta_net.key_head(2), 1);
  EXPECT_TRUE(grouped.layer(0).ffn.experts.normalised);
  EXPECT_TRUE(grouped.layer(0).ffn.experts.shared_gate);
  EXPECT_EQ(grouped.layer(0).ffn.experts.n_shared_ff, 24);

  TinyModel one_by_one = hybrid();
  one_by_one.n_layer = 3;
  one_by_one.recurrent = {false, true, true};
  EXPECT_EQ(good(one_by_one).n_recurrent(), 2);
  EXPECT_FALSE(good(one_by_one).layer(0).delta_net);
}

// --- refusals
// -----------------------------------------------------------------------------------------------------

void experts_refused(const std::string& architecture, const std::string& key, int n,
                     const std::vector<std::string>& words, StatusCode code = StatusCode::invalid_file) {
  TinyModel m = with_experts(architecture);
  m.edit_metadata = [&](gguf_context* g) {
    const std::string name = architecture + "." + key;
    if (n < 0) {
      gguf_remove_key(g, name.c_str());
    } else {
      gguf_set_val_u32(g, name.c_str(), static_cast<uint32_t>(n));
    }
  };
  expect_refusal(status_of(read(m)), code, words);
}

TEST(SpecRefusals, ExpertsThatCannotBe) {
  experts_refused("qwen3moe", "expert_count", 0, {"expert_count", "0"});
  experts_refused("qwen3moe", "expert_count", -1, {"expert_count", "missing"});
  experts_refused("qwen3moe", "expert_count", 1 << 30, {"expert_count", "4096"});
  experts_refused("qwen3moe", "expert_used_count", 0, {"expert_used_count = 0", "1 and 8"});
  experts_refused("qwen3moe", "expert_used_count", 9, {"expert_used_count = 9", "1 and 8"});
  experts_refused("llama", "expert_used_count", -1, {"expert_used_count", "missing"});
  experts_refused("qwen3moe", "expert_feed_forward_length", 0, {"expert_feed_forward_length = 0"});
  experts_refused("qwen3moe", "expert_group_count", 4, {"groups", "4"}, StatusCode::unsupported);
  for (const char* dense : {"qwen2", "qwen3", "gemma3"})
    experts_refused(dense, "expert_count", 8, {"8 experts"}, StatusCode::unsupported);
}

TEST(Spec, LayersThatKnowNoPositions) {
  TinyModel m;
  m.architecture = "smollm3";
  m.n_layer = 9;
  const ModelSpec spec = good(m);
  for (int64_t i = 0; i < 9; ++i) EXPECT_EQ(spec.rope_of(i).freq_scale, i % 4 == 3 ? 0 : 1) << i;
  m.architecture = "granite";
  m.logit_scale = 4;
  m.residual_scale = 0.25;
  m.no_rope = true;
  const ModelSpec granite = good(m);
  EXPECT_EQ(granite.rope_of(0).freq_scale, 0);
  EXPECT_EQ(granite.logit_scale, 0.25F);
  EXPECT_EQ(granite.layers.at(8).residual_scale, 0.25F);
  EXPECT_EQ(granite.embedding_scale, 1);
}

TEST(Spec, QueriesThatGrowWithThePosition) {
  AttentionSpec a;
  EXPECT_EQ(a.query_factor(1 << 20), 1);
  a.temperature = 0.1;
  a.temperature_step = 100;
  EXPECT_EQ(a.query_factor(99), 1);
  EXPECT_FLOAT_EQ(a.query_factor(100), static_cast<float>(1 + 0.1 * std::log(2.0)));
  EXPECT_FLOAT_EQ(a.query_factor(999), static_cast<float>(1 + 0.1 * std::log(10.0)));
}

TEST(SpecRefusals, KeysOfOneArchitecture) {
  TinyModel m;
  m.architecture = "granite";
  expect_refusal(status_of(read(m)), StatusCode::invalid_file, {"granite.logit_scale", "missing"});
  m.logit_scale = 1;
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_u32(g, "granite.rope.scaling.finetuned", 1); };
  expect_refusal(status_of(read(m)), StatusCode::invalid_file, {"finetuned", "true or false", "u32"});
  TinyModel olmo2;
  olmo2.architecture = "olmo2";
  olmo2.window = 8;
  olmo2.windows = {true, false, true};
  expect_refusal(status_of(read(olmo2)), StatusCode::invalid_file,
                 {"sliding_window_pattern", "3 entries", "2 layers"});
  TinyModel glm4;
  glm4.architecture = "glm4";
  glm4.edit_metadata = [](gguf_context* g) { gguf_set_val_u32(g, "glm4.nextn_predict_layers", 1); };
  expect_refusal(status_of(read(glm4)), StatusCode::unsupported, {"nextn"});
}

TEST(SpecRefusals, Hybrids) {
  const auto refuses = [](const std::function<void(gguf_context*)>& edit,
                          const std::vector<std::string>& words, StatusCode code = StatusCode::invalid_file) {
    expect_refusal(status_of(read(hybrid(edit))), code, words);
  };
  for (const char* key : {"ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank",
                          "ssm.inner_size", "rope.dimension_sections"}) {
    refuses([key](gguf_context* g) { gguf_remove_key(g, (std::string("qwen35.") + key).c_str()); },
            {key, "missing"});
  }
  const auto with_number = [](const char* key, uint32_t n) {
    return [key, n](gguf_context* g) { gguf_set_val_u32(g, key, n); };
  };
  refuses(with_number("qwen35.ssm.group_count", 3), {"3", "4", "go together"});
  refuses(with_number("qwen35.ssm.inner_size", 63), {"63", "go together"});
  refuses(with_number("qwen35.ssm.state_size", 512), {"state_size", "256"});
  refuses(with_number("qwen35.ssm.conv_kernel", 9), {"conv_kernel", "8"});
  refuses(with_number("qwen35.full_attention_interval", 9), {"no layer attends"}, StatusCode::unsupported);
  refuses(with_number("qwen35.nextn_predict_layers", 8), {"nextn_predict_layers"});
  refuses(
      [](gguf_context* g) {
        const bool short_list[] = {true, false};
        gguf_set_arr_data(g, "qwen35.attention.recurrent_layers", GGUF_TYPE_BOOL, short_list, 2);
      },
      {"recurrent_layers", "2 entries", "8 layers"});
  // Sections that give a coordinate no position of a text's, or are no numbers of coordinates.
  const auto with_sections = [](const std::vector<int32_t>& s) {
    return [s](gguf_context* g) {
      gguf_set_arr_data(g, "qwen35.rope.dimension_sections", GGUF_TYPE_INT32, s.data(), s.size());
    };
  };
  refuses(with_sections({2, 2, 1, 1}), {"sections"}, StatusCode::unsupported);
  refuses(with_sections({0, 0, 0, 0}), {"sections"}, StatusCode::unsupported);
  refuses(with_sections({-1, 2, 2, 0}), {"sections", "impossible"});
  EXPECT_TRUE(status_of(read(hybrid(with_sections({2, 2, 2})))).ok());
}

TEST(SpecRefusals, OtherArchitecturesListOurs) {
  for (const std::string name : {"gemma2", "phi2", "", "LLAMA", "clip"}) {
    TinyModel m;
    m.edit_metadata = [=](gguf_context* g) { gguf_set_val_str(g, "general.architecture", name.c_str()); };
    expect_refusal(status_of(read(m)), StatusCode::unsupported,
                   {"m.gguf", "'" + name + "'", "gemma3", "llama", "qwen2", "qwen3", "qwen3moe"});
  }
  refused([](gguf_context* g) { gguf_remove_key(g, "general.architecture"); },
          {"general.architecture", "missing"});
  refused([](gguf_context* g) { gguf_set_val_u32(g, "general.architecture", 3); },
          {"general.architecture", "u32"});
  // Whatever stands there, the answer is one line.
  refused([](gguf_context* g) { gguf_set_val_str(g, "general.architecture", "a\nb\r\x1b[31m"); }, {"llama"},
          StatusCode::unsupported);
  const auto huge = with(
      [](gguf_context* g) { gguf_set_val_str(g, "general.architecture", std::string(100000, 'x').c_str()); });
  EXPECT_LT(status_of(read(huge)).message().size(), 1000U);
}

TEST(SpecRefusals, KeysThatMustBeThere) {
  for (const char* key : {"llama.block_count", "llama.embedding_length", "llama.feed_forward_length",
                          "llama.attention.head_count", "llama.context_length",
                          "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens"}) {
    refused([=](gguf_context* g) { gguf_remove_key(g, key); }, {key, "missing"});
  }
}

const std::vector<const char*> kWhole = {"llama.block_count",
                                         "llama.embedding_length",
                                         "llama.feed_forward_length",
                                         "llama.attention.head_count",
                                         "llama.attention.head_count_kv",
                                         "llama.context_length",
                                         "llama.attention.key_length",
                                         "llama.attention.value_length",
                                         "llama.rope.dimension_count",
                                         "llama.rope.scaling.original_context_length",
                                         "llama.expert_count"};
const std::vector<const char*> kReal = {"llama.attention.layer_norm_rms_epsilon",
                                        "llama.rope.freq_base",
                                        "llama.rope.scaling.factor",
                                        "llama.rope.scale_linear",
                                        "llama.rope.scaling.attn_factor",
                                        "llama.attention.scale"};

TEST(SpecRefusals, KeysOfAWrongType) {
  const int32_t array[2] = {2, 2};
  for (const char* key : kWhole) {
    refused([=](gguf_context* g) { gguf_set_val_str(g, key, "2"); }, {key, "str"});
    refused([=](gguf_context* g) { gguf_set_val_f32(g, key, 2); }, {key, "f32"});
    refused([=](gguf_context* g) { gguf_set_val_bool(g, key, true); }, {key, "bool"});
    refused([&](gguf_context* g) { gguf_set_arr_data(g, key, GGUF_TYPE_INT32, array, 2); }, {key, "arr"});
    refused([&](gguf_context* g) { gguf_set_arr_data(g, key, GGUF_TYPE_INT32, array, 0); }, {key, "arr"});
  }
  for (const char* key : kReal) {
    refused([=](gguf_context* g) { gguf_set_val_u32(g, key, 1); }, {key, "u32"});
    refused([=](gguf_context* g) { gguf_set_val_str(g, key, "1e-5"); }, {key, "str"});
    refused([&](gguf_context* g) { gguf_set_arr_data(g, key, GGUF_TYPE_INT32, array, 2); }, {key, "arr"});
  }
  refused([](gguf_context* g) { gguf_set_val_u32(g, "general.name", 1); }, {"general.name"});
  refused([](gguf_context* g) { gguf_set_val_u32(g, "llama.rope.scaling.type", 1); },
          {"llama.rope.scaling.type"});
  refused([](gguf_context* g) { gguf_set_val_u32(g, "tokenizer.ggml.tokens", 258); },
          {"tokenizer.ggml.tokens"});
  refused([&](gguf_context* g) { gguf_set_arr_data(g, "tokenizer.ggml.tokens", GGUF_TYPE_INT32, array, 0); },
          {"tokenizer.ggml.tokens"});
}

TEST(SpecRefusals, WholeNumbersThatCannotBe) {
  for (const char* key : kWhole) {
    const bool experts = std::string(key) == "llama.expert_count";
    for (const int64_t value : {std::numeric_limits<int64_t>::min(), int64_t{-1}, int64_t{0},
                                int64_t{1} << 41, std::numeric_limits<int64_t>::max()}) {
      if (experts && value == 0) continue;
      refused([=](gguf_context* g) { gguf_set_val_i64(g, key, value); }, {key, std::to_string(value)});
    }
    refused([=](gguf_context* g) { gguf_set_val_u64(g, key, ~uint64_t{0}); }, {key});
  }
  refused([](gguf_context* g) { gguf_set_val_u32(g, "llama.attention.head_count_kv", 3); },
          {"4", "3", "multiple"});
  refused([](gguf_context* g) { gguf_set_val_u32(g, "llama.attention.head_count_kv", 8); },
          {"head_count_kv", "8"});
  refused([](gguf_context* g) { gguf_set_val_u32(g, "llama.attention.head_count", 5); },
          {"64", "5", "multiple"});
  refused([](gguf_context* g) { gguf_set_val_u32(g, "llama.attention.value_length", 8); }, {"16", "8"},
          StatusCode::unsupported);
  refused([](gguf_context* g) { gguf_set_val_u32(g, "llama.rope.dimension_count", 7); },
          {"dimension_count", "7", "odd"});
  refused([](gguf_context* g) { gguf_set_val_u32(g, "llama.rope.dimension_count", 18); },
          {"dimension_count", "18"});
  refused([](gguf_context* g) { gguf_set_val_u32(g, "llama.attention.key_length", 15); }, {"15"});
}

TEST(SpecRefusals, RealNumbersThatCannotBe) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  for (const char* key : kReal) {
    for (const float value : {nan, inf, -inf, -1.0F, 1e30F}) {
      refused([=](gguf_context* g) { gguf_set_val_f32(g, key, value); }, {key});
    }
    refused([=](gguf_context* g) { gguf_set_val_f64(g, key, std::nan("")); }, {key});
  }
  for (const char* key : {"llama.rope.freq_base", "llama.rope.scaling.attn_factor"}) {
    refused([=](gguf_context* g) { gguf_set_val_f32(g, key, 0); }, {key});
  }
  for (const char* key :
       {"yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier"}) {
    refused(
        [=](gguf_context* g) {
          gguf_set_val_str(g, "llama.rope.scaling.type", "yarn");
          gguf_set_val_f32(g, (std::string("llama.rope.scaling.") + key).c_str(), nan);
        },
        {key});
  }
}

TEST(SpecRefusals, OtherRopeKinds) {
  for (const char* kind : {"longrope", "su", "dynamic", "", "a\nb"}) {
    refused([=](gguf_context* g) { gguf_set_val_str(g, "llama.rope.scaling.type", kind); },
            {"yarn", "linear"}, StatusCode::unsupported);
  }
}

// A tiny file must not be able to ask for a table of gigabytes: RoPE's grows with the context.
TEST(SpecRefusals, AContextThatNoModelHas) {
  refused([](gguf_context* g) { gguf_set_val_u64(g, "llama.context_length", uint64_t{1} << 32); },
          {"context_length"});
  EXPECT_EQ(good(with([](gguf_context* g) {
              gguf_set_val_u32(g, "llama.context_length", 10'485'760);
            })).n_ctx_train,
            10'485'760);
}

}  // namespace
}  // namespace narrows::testing
