// The kinds of model that this build runs: every architecture, head layout, RoPE kind and weight type, as
// tiny models.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "support/tiny_model.h"

namespace narrows::testing {

struct TinyCase {
  std::string name;
  TinyModel model;
  bool float_weights = true;  ///< all matrices float32: nothing is rounded but float32 itself
};

inline std::ostream& operator<<(std::ostream& out, const TinyCase& c) { return out << c.name; }

/// Cases with one head layout, RoPE kind or set of tensors each, all in float32.
inline std::vector<TinyCase> float_cases() {
  TinyModel llama;
  TinyModel qwen2;
  qwen2.architecture = "qwen2";
  qwen2.freq_base = 1e6;
  TinyModel qwen3;  // key_length is not n_embd / n_head
  qwen3.architecture = "qwen3";
  qwen3.head_dim = 32;
  qwen3.freq_base = 1e6;
  std::vector<TinyCase> all;
  const auto add = [&](const char* name, TinyModel m, auto&& change) {
    change(m);
    all.push_back({name, std::move(m)});
  };
  add("llama", llama, [](TinyModel&) {});
  add("llama_mha", llama, [](TinyModel& m) { m.n_head_kv = 4; });
  add("llama_one_kv_head", llama, [](TinyModel& m) { m.n_head_kv = 1; });
  add("llama_6_2_heads", llama, [](TinyModel& m) {
    m.n_embd = 96;
    m.n_head = 6;
  });
  add("llama_d32_three_layers", llama, [](TinyModel& m) {
    m.n_embd = 128;
    m.head_dim = 32;
    m.n_layer = 3;
  });
  add("llama_tied", llama, [](TinyModel& m) { m.tied_output = true; });
  add("llama_biases", llama, [](TinyModel& m) { m.qkv_bias = m.other_bias = true; });
  add("llama_linear", llama, [](TinyModel& m) {
    m.rope_scaling = "linear";
    m.rope_factor = 4;
  });
  add("llama_scaling_none", llama, [](TinyModel& m) {  // a factor without a kind of scaling means nothing
    m.rope_scaling = "none";
    m.rope_factor = 4;
  });
  add("llama_yarn", llama, [](TinyModel& m) {
    m.rope_scaling = "yarn";
    m.rope_factor = 4;
    m.n_ctx_orig = 512;
  });
  add("llama_rope_factors", llama, [](TinyModel& m) {  // as Llama 3.1 has them
    m.rope_factors = {1, 1, 1.5, 2, 4, 8, 8, 8};
    m.freq_base = 500000;
  });
  add("qwen2", qwen2, [](TinyModel&) {});
  add("qwen2_yarn", qwen2, [](TinyModel& m) {
    m.rope_scaling = "yarn";
    m.rope_factor = 4;
    m.n_ctx_orig = 256;
  });
  add("qwen2_output_bias", qwen2, [](TinyModel& m) { m.output_bias = m.tied_output = true; });
  add("qwen3", qwen3, [](TinyModel&) {});
  add("qwen3_linear_tied", qwen3, [](TinyModel& m) {
    m.rope_scaling = "linear";
    m.rope_factor = 2;
    m.tied_output = true;
  });
  TinyModel experts;
  experts.architecture = "qwen3moe";
  experts.head_dim = 32;
  experts.n_ff = 48;
  experts.n_expert = 8;
  experts.n_used = 3;
  experts.freq_base = 1e6;
  add("qwen3moe", experts, [](TinyModel&) {});
  add("qwen3moe_one_used_tied", experts, [](TinyModel& m) {
    m.n_used = 1;
    m.tied_output = true;
  });
  add("qwen3moe_all_used", experts, [](TinyModel& m) { m.n_expert = m.n_used = 5; });
  add("qwen3moe_one_expert", experts, [](TinyModel& m) { m.n_expert = m.n_used = 1; });
  add("mixtral", experts, [](TinyModel& m) {
    m.architecture = "llama";
    m.head_dim = 16;
    m.n_ff = 40;  // no multiple of a tile
    m.n_used = 2;
  });
  add("olmoe", experts, [](TinyModel& m) {
    m.architecture = "olmoe";
    m.head_dim = 16;
    m.n_head_kv = 4;  // libllama knows no others
    m.freq_base = 1e4;
  });
  const auto granite = [](TinyModel& m) {
    m.embedding_scale = 1.5;
    m.residual_scale = 0.7;
    m.logit_scale = 0.5;
    m.attention_scale = 0.2;
  };
  add("granite", llama, [&](TinyModel& m) {
    m.architecture = "granite";
    granite(m);
    m.other_bias = true;
  });
  add("granite_no_rope_tied", llama, [&](TinyModel& m) {
    m.architecture = "granite";
    m.logit_scale = 0.8;
    m.no_rope = m.tied_output = true;
  });
  add("granitemoe", experts, [&](TinyModel& m) {
    m.architecture = "granitemoe";
    m.head_dim = 16;
    granite(m);
  });
  add("granitemoe_shared", experts, [&](TinyModel& m) {
    m.architecture = "granitemoe";
    m.head_dim = 16;
    m.n_shared_ff = 80;
    granite(m);
  });
  add("qwen2moe", experts, [&](TinyModel& m) {
    m.architecture = "qwen2moe";
    m.head_dim = 16;
    m.n_shared_ff = 72;
  });
  add("smollm3", llama, [](TinyModel& m) {
    m.architecture = "smollm3";
    m.n_layer = 5;  // layer 3 knows no positions
    m.tied_output = true;
  });
  add("glm4", llama, [](TinyModel& m) {
    m.architecture = "glm4";
    m.n_rot = 8;
  });
  add("glm4_biases", llama, [](TinyModel& m) {
    m.architecture = "glm4";
    m.qkv_bias = true;
  });
  TinyModel phi3;
  phi3.architecture = "phi3";
  phi3.short_factors = {1, 1, 1.1F, 1.2F, 1.3F, 1.5F, 2, 2};
  phi3.long_factors = {1, 1.2F, 1.5F, 2, 4, 8, 16, 20};
  phi3.rope_scaling = "longrope";
  add("phi3_long", phi3, [](TinyModel& m) { m.n_ctx_orig = 100; });
  add("phi3_short", phi3, [](TinyModel& m) { m.n_ctx_orig = 4096; });
  add("phi3_one_rope", phi3, [](TinyModel& m) {
    m.short_factors = m.long_factors = {};
    m.rope_scaling.clear();
    m.n_ff = 120;  // no multiple of a tile
  });
  add("mistral3", llama, [](TinyModel& m) {
    m.architecture = "mistral3";
    m.rope_scaling = "yarn";
    m.rope_factor = 4;
    m.n_ctx_orig = 50;
    m.temperature = 0.3;
  });
  TinyModel olmo2;
  olmo2.architecture = "olmo2";
  olmo2.n_layer = 4;
  add("olmo2", olmo2, [](TinyModel&) {});
  add("olmo2_windows_one_by_one", olmo2, [](TinyModel& m) {
    m.window = 30;
    m.windows = {true, false, false, true};
  });
  add("olmo2_windows_yarn", olmo2, [](TinyModel& m) {
    m.n_layer = 5;
    m.window = 24;  // but layer 3
    m.rope_scaling = "yarn";
    m.rope_factor = 4;
    m.n_ctx_orig = 128;
  });
  TinyModel gemma3;
  gemma3.architecture = "gemma3";
  gemma3.head_dim = 32;
  gemma3.n_layer = 4;
  gemma3.freq_base = 1e6;
  gemma3.window = 24;  // layers 0, 1 and 3; layer 2 sees all
  gemma3.window_period = 3;
  gemma3.tied_output = true;
  add("gemma3", gemma3, [](TinyModel&) {});
  add("gemma3_long_window", gemma3, [](TinyModel& m) { m.window = 100; });
  add("gemma3_linear", gemma3, [](TinyModel& m) {  // of the layers that see all, alone
    m.rope_scaling = "linear";
    m.rope_factor = 4;
  });
  add("gemma3_no_window", gemma3, [](TinyModel& m) { m.window = m.window_period = 0; });
  TinyModel hybrid;
  hybrid.architecture = "qwen35";
  hybrid.n_layer = 4;
  hybrid.head_dim = 32;
  hybrid.n_rot = 12;
  hybrid.freq_base = 1e6;
  add("qwen35", hybrid, [](TinyModel&) {});
  add("qwen35_as_many_heads_tied", hybrid, [](TinyModel& m) {
    m.delta_head_v = m.delta_head_k = 3;
    m.delta_dim = 32;
    m.tied_output = true;
  });
  add("qwen35_one_key_head", hybrid, [](TinyModel& m) {  // rotates whole heads
    m.delta_head_k = 1;
    m.delta_head_v = 3;
    m.n_conv = 3;
    m.n_rot = 0;
    m.n_layer = 3;
    m.attends_in = 3;
  });
  add("qwen35_one_by_one_nextn", hybrid, [](TinyModel& m) {  // ends with a DeltaNet layer
    m.recurrent = {true, false, true, true};
    m.n_nextn = 1;
  });
  const auto with_experts = [](TinyModel& m) {
    m.n_expert = 8;
    m.n_used = 3;
    m.n_ff = 48;
    m.n_shared_ff = 40;
  };
  add("qwen35moe", hybrid, [&](TinyModel& m) {
    m.architecture = "qwen35moe";
    with_experts(m);
  });
  add("qwen35moe_joined_tied", hybrid, [&](TinyModel& m) {
    m.architecture = "qwen35moe";
    with_experts(m);
    m.joined_experts = m.tied_output = true;
    m.delta_head_k = m.delta_head_v = 4;
  });
  add("qwen3next", hybrid, [&](TinyModel& m) {
    m.architecture = "qwen3next";
    with_experts(m);
  });
  add("qwen3next_old_tensors", hybrid, [&](TinyModel& m) {
    m.architecture = "qwen3next";
    with_experts(m);
    m.old_tensors = true;
    m.delta_head_v = 6;
    m.n_used = 1;
  });
  TinyModel oss = experts;
  oss.architecture = "gpt-oss";
  oss.head_dim = 16;
  oss.n_layer = 3;
  oss.window = 24;  // layers 0 and 2
  add("gpt_oss", oss, [](TinyModel&) {});
  add("gpt_oss_yarn", oss, [](TinyModel& m) {  // as the released ones
    m.n_head_kv = 1;
    m.head_dim = 32;
    m.window = 128;
    m.rope_scaling = "yarn";
    m.rope_factor = 32;
    m.n_ctx_orig = 64;
  });
  add("gpt_oss_long_window", oss, [](TinyModel& m) {
    m.window = 4000;
    m.n_used = 1;
  });
  return all;
}

/// Cases with one weight type or mix of types each.
inline std::vector<TinyCase> quantised_cases() {
  std::vector<TinyCase> all;
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0,
                               GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL}) {
    TinyModel m;
    m.type = type;
    all.push_back({std::string("llama_") + ggml_type_name(type), m, false});
  }
  TinyModel k_quants;  // their rows are multiples of 256
  k_quants.architecture = "qwen3";
  k_quants.type = GGML_TYPE_Q4_K;
  k_quants.n_embd = k_quants.n_ff = 256;
  k_quants.head_dim = 64;
  all.push_back({"qwen3_q4_K", k_quants, false});
  k_quants.architecture = "llama";
  k_quants.type = GGML_TYPE_Q5_K;
  all.push_back({"llama_q5_K", k_quants, false});
  k_quants.type = GGML_TYPE_Q3_K;  // a type without tiles
  all.push_back({"llama_q3_K", k_quants, false});
  k_quants.architecture = "qwen2";
  k_quants.type = GGML_TYPE_Q6_K;
  k_quants.tied_output = true;
  all.push_back({"qwen2_q6_K_tied", k_quants, false});
  TinyModel mixed;  // q, k, v and gate, up of different types stay apart
  mixed.architecture = "qwen2";
  mixed.type = GGML_TYPE_Q4_0;
  mixed.types = {{"attn_v", GGML_TYPE_Q8_0}, {"ffn_up", GGML_TYPE_F16}, {"token_embd", GGML_TYPE_Q8_0}};
  all.push_back({"qwen2_mixed", mixed, false});
  TinyModel tied = mixed;
  tied.architecture = "llama";
  tied.tied_output = true;
  all.push_back({"llama_mixed_tied", tied, false});
  TinyModel experts;
  experts.architecture = "qwen3moe";
  experts.n_ff = 96;
  experts.n_expert = 6;
  experts.n_used = 2;
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
    experts.type = type;
    all.push_back({std::string("qwen3moe_") + ggml_type_name(type), experts, false});
  }
  TinyModel joined;  // tensors that are cut up
  joined.architecture = "phi3";
  joined.type = GGML_TYPE_Q8_0;
  joined.n_ff = 96;
  all.push_back({"phi3_q8_0", joined, false});
  joined.architecture = "glm4";
  joined.type = GGML_TYPE_Q4_0;
  all.push_back({"glm4_q4_0", joined, false});
  experts.type = GGML_TYPE_Q5_0;  // gate and up stay apart
  experts.types = {{"ffn_up_exps", GGML_TYPE_Q8_0}, {"ffn_down_exps", GGML_TYPE_F16}};
  experts.tied_output = true;
  all.push_back({"qwen3moe_mixed_tied", experts, false});
  experts.architecture = "qwen2moe";
  experts.types.clear();
  experts.type = GGML_TYPE_Q8_0;
  experts.n_shared_ff = 64;
  experts.n_used = experts.n_expert;  // and nearly alike, as below
  experts.router_gain = 0.3;
  experts.tied_output = false;
  all.push_back({"qwen2moe_q8_0", experts, false});
  experts = k_quants;
  experts.architecture = "qwen3moe";
  // Experts alone, all of them used and nearly alike: else what rounding changes of the choice is more than
  // what is asked of a quantised model here (libllama's own f16 cache costs a KL of .006 to .03 then).
  experts.type = GGML_TYPE_F32;
  experts.types = {{"gate_exps", GGML_TYPE_Q4_K}, {"up_exps", GGML_TYPE_Q4_K}, {"down_exps", GGML_TYPE_Q6_K}};
  experts.n_expert = experts.n_used = 4;
  experts.router_gain = 0.3;
  all.push_back({"qwen3moe_q4_K_q6_K", experts, false});
  TinyModel hybrid;
  hybrid.architecture = "qwen35";
  hybrid.n_layer = 4;
  hybrid.head_dim = 32;
  hybrid.n_rot = 12;
  hybrid.delta_dim = 32;
  // Of fewer bits tests/engine/hybrid_test.cpp: where few layers attend, the rounding of activations is more
  // than that of the f16 cache, by which steps are judged here.
  hybrid.type = GGML_TYPE_F16;
  hybrid.types = {{"attn_v", GGML_TYPE_F32}, {"attn_gate", GGML_TYPE_F32}, {"ssm_alpha", GGML_TYPE_F32}};
  all.push_back({"qwen35_mixed", hybrid, false});
  TinyModel oss;  // as released: experts in MXFP4, the rest in bfloat16
  oss.architecture = "gpt-oss";
  oss.n_ff = 96;
  oss.n_expert = oss.n_used = 4;
  oss.router_gain = 0.3;
  oss.window = 40;
  oss.type = GGML_TYPE_BF16;
  oss.types = {{"_exps", GGML_TYPE_MXFP4}};
  all.push_back({"gpt_oss_mxfp4", oss, false});
  return all;
}

inline std::vector<TinyCase> all_cases() {
  std::vector<TinyCase> all = float_cases();
  for (TinyCase& c : quantised_cases()) all.push_back(std::move(c));
  return all;
}

}  // namespace narrows::testing
