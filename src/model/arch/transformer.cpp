// Reads and checks the keys that most families share. Ranges are wide enough for any real model and tight
// enough that no product of two sizes overflows 64 bits later on.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/utf8.h"
#include "model/arch/architecture.h"

namespace narrows {

namespace {

/// YaRN's growth of the attention temperature with the scaling factor.
double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

Status read_rope(KeyReader& keys, int64_t head_dim, int64_t n_ctx_train, kernels::RopeParams& r) {
  r.n_rot = keys.integer("rope.dimension_count", head_dim, 2, head_dim);
  r.freq_base = keys.real("rope.freq_base", 10000.0, 1e-3, 1e15);
  r.n_ctx_orig = keys.integer("rope.scaling.original_context_length", n_ctx_train, 1, int64_t{1} << 40);
  const double old_factor = keys.real("rope.scale_linear", 0.0, 0.0, 1e6);
  const double factor = keys.real("rope.scaling.factor", old_factor, 0.0, 1e6);
  const std::string kind = keys.text("rope.scaling.type", "linear");
  r.attn_factor = keys.real("rope.scaling.attn_factor", 1.0, 1e-6, 1e6);
  if (!keys.status().ok()) return keys.status();
  if (r.n_rot % 2 != 0) return keys.bad(fmt::format("rope.dimension_count = {} is odd", r.n_rot));

  if (kind != "none" && factor > 0) r.freq_scale = 1.0 / factor;
  if (kind == "yarn") {
    r.ext_factor = keys.real("rope.scaling.yarn_ext_factor", 1.0, -1.0, 1e3);
    if (r.ext_factor < 0) r.ext_factor = 1.0;
    r.attn_factor *= keys.real("rope.scaling.yarn_attn_factor", 1.0, 1e-6, 1e6);
    r.beta_fast = keys.real("rope.scaling.yarn_beta_fast", 32.0, 0.0, 1e6);
    r.beta_slow = keys.real("rope.scaling.yarn_beta_slow", 1.0, 0.0, 1e6);
    const double log_multiplier = keys.real("rope.scaling.yarn_log_multiplier", 0.0, 0.0, 1e3);
    if (log_multiplier != 0) r.attn_factor /= yarn_mscale(1.0 / r.freq_scale, log_multiplier);
  } else if (kind != "linear" && kind != "none" &&
             !(kind == "longrope" && keys.file().find("rope_factors_long.weight") != nullptr)) {
    return keys.unsupported(fmt::format(
        "RoPE scaling {} is not supported, this build has none, linear, yarn and longrope with its "
        "tensors of factors",
        quote(kind)));
  }
  return keys.status();
}

/// ffn.n_ff before: that of a dense layer. The models that people run have up to 512 experts.
Status read_experts(KeyReader& keys, Experts which, FfnSpec& ffn) {
  const int64_t n_expert = keys.integer("expert_count", 0, 0, 4096);
  if (!keys.status().ok()) return keys.status();
  if (n_expert == 0) {
    return which == Experts::always
               ? keys.bad("metadata expert_count is missing or 0, its layers are of experts")
               : Status();
  }
  if (which == Experts::never) {
    return keys.unsupported(
        fmt::format("{} experts are not supported in a model of this architecture", n_expert));
  }
  ExpertSpec& e = ffn.experts;
  e.n_expert = n_expert;
  e.n_used = keys.integer("expert_used_count", std::nullopt, 1, n_expert);
  const double scale = keys.real("expert_weights_scale", 0.0, 0.0, 1e6);
  const int64_t n_group = keys.integer("expert_group_count", 0, 0, n_expert);
  if (!keys.status().ok()) return keys.status();
  if (scale != 0) e.scale = static_cast<float>(scale);
  if (n_group > 1)
    return keys.unsupported(fmt::format("experts chosen by groups ({} of them) are not supported", n_group));
  // Older files of some families say only what all experts of a token have together.
  ffn.n_ff = keys.integer("expert_feed_forward_length",
                          which == Experts::always ? std::max<int64_t>(ffn.n_ff / e.n_used, 1) : ffn.n_ff, 1,
                          1 << 22);
  return keys.status();
}

}  // namespace

Status read_transformer(KeyReader& keys, ModelSpec& spec, Experts experts) {
  const int64_t n_block = keys.integer("block_count", std::nullopt, 1, 4096);
  // Layers that predict further tokens than the next come last.
  spec.n_layer_unused = keys.integer("nextn_predict_layers", 0, 0, std::max<int64_t>(n_block - 1, 0));
  const int64_t n_layer = n_block - spec.n_layer_unused;
  spec.n_embd = keys.integer("embedding_length", std::nullopt, 1, 1 << 20);
  LayerSpec layer;
  AttentionSpec& a = layer.attention;
  // Files of experts alone may leave it out.
  const bool is_said = keys.has("feed_forward_length") || !keys.has("expert_feed_forward_length");
  layer.ffn.n_ff = is_said ? keys.integer("feed_forward_length", std::nullopt, 1, 1 << 22) : 0;
  a.n_head = keys.integer("attention.head_count", std::nullopt, 1, 1 << 14);
  a.n_head_kv = keys.integer("attention.head_count_kv", a.n_head, 1, a.n_head);
  spec.n_ctx_train = keys.integer("context_length", std::nullopt, 1, kMaxContext);
  const bool has_head_dim = keys.has("attention.key_length");
  if (!keys.status().ok()) return keys.status();
  if (!has_head_dim && spec.n_embd % a.n_head != 0) {
    return keys.bad(
        fmt::format("embedding_length {} is no multiple of attention.head_count {}", spec.n_embd, a.n_head));
  }
  a.head_dim = keys.integer("attention.key_length", spec.n_embd / a.n_head, 2, 4096);
  const int64_t value_dim = keys.integer("attention.value_length", a.head_dim, 1, 4096);
  spec.rms_eps = static_cast<float>(keys.real("attention.layer_norm_rms_epsilon", std::nullopt, 0.0, 1.0));
  const double plain_scale = 1.0 / std::sqrt(static_cast<double>(a.head_dim));
  const double scale = keys.real("attention.scale", 0.0, 0.0, 1e6);
  a.scale = static_cast<float>(scale == 0 ? plain_scale : scale);
  kernels::RopeParams rope;
  if (Status s = read_rope(keys, a.head_dim, spec.n_ctx_train, rope); !s.ok()) return s;

  const std::optional<int64_t> vocabulary = keys.file().array_size("tokenizer.ggml.tokens");
  if (!vocabulary || *vocabulary < 1) return keys.bad("metadata tokenizer.ggml.tokens is missing or empty");
  spec.n_vocab = *vocabulary;
  if (Status s = read_experts(keys, experts, layer.ffn); !s.ok()) return s;
  if (a.n_head % a.n_head_kv != 0) {
    return keys.bad(
        fmt::format("attention.head_count {} is no multiple of head_count_kv {}", a.n_head, a.n_head_kv));
  }
  if (value_dim != a.head_dim) {
    return keys.unsupported(fmt::format("keys of {} and values of {} coordinates a head: they must be equal",
                                        a.head_dim, value_dim));
  }
  spec.ropes.push_back(std::move(rope));
  spec.layers.assign(static_cast<size_t>(n_layer), layer);
  return {};
}

Status read_delta_net(KeyReader& keys, bool grouped, ModelSpec& spec) {
  DeltaNetSpec d;
  d.n_conv = keys.integer("ssm.conv_kernel", std::nullopt, 1, kernels::kMostConv);
  d.head_dim = keys.integer("ssm.state_size", std::nullopt, 1, kernels::kMaxDeltaDim);
  d.n_head_k = keys.integer("ssm.group_count", std::nullopt, 1, 1 << 14);
  d.n_head_v = keys.integer("ssm.time_step_rank", std::nullopt, 1, 1 << 14);
  const int64_t inner = keys.integer("ssm.inner_size", std::nullopt, 1, 1 << 22);
  const int64_t period = keys.integer("full_attention_interval", 4, 1, 4096);
  d.grouped = grouped;
  const int64_t n_said = spec.n_layer() + spec.n_layer_unused;
  std::vector<bool> is_recurrent = keys.flags("attention.recurrent_layers", n_said);
  if (!keys.status().ok()) return keys.status();
  if (d.n_head_v % d.n_head_k != 0 || inner != d.width_v()) {
    return keys.bad(fmt::format(
        "ssm.group_count {}, ssm.time_step_rank {}, ssm.state_size {} and ssm.inner_size {} do not "
        "go together",
        d.n_head_k, d.n_head_v, d.head_dim, inner));
  }
  if (is_recurrent.empty()) is_recurrent = all_but_one_in(period, spec.n_layer());
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    LayerSpec& l = spec.layers[i];
    l.ffn_norm_is_post_attention = true;
    l.attention.qk_norm = l.attention.output_gate = true;
    if (!is_recurrent[i]) continue;
    l.attention = {};
    l.delta_net = d;
  }
  return {};
}

Status check_sections(KeyReader& keys, const ModelSpec& spec) {
  std::vector<int64_t> sections = keys.integers("rope.dimension_sections");
  if (sections.empty()) return keys.bad("metadata rope.dimension_sections is missing");
  sections.resize(4);
  const int64_t half = spec.ropes.front().n_rot / 2;
  int64_t all = 0;
  for (const int64_t s : sections) {
    if (s < 0 || s > half) return keys.bad("metadata rope.dimension_sections holds impossible numbers");
    all += s;
  }
  for (int64_t i = 0; i < half; ++i) {
    const int64_t at = all > 0 ? i % all : 0, kind = at % 3;
    if (at >= 3 * sections[static_cast<size_t>(kind)])
      return keys.unsupported(
          "RoPE sections that leave a coordinate of text without a position are not supported");
  }
  return {};
}

Status read_shared_expert(KeyReader& keys, int64_t n_ff, ModelSpec& spec) {
  const int64_t n_shared = keys.integer("expert_shared_feed_forward_length", 0, 0, 1 << 22);
  for (LayerSpec& l : spec.layers) {
    l.ffn.experts.n_shared_ff = n_shared > 0 ? n_shared : n_ff;
    l.ffn.experts.shared_gate = true;
  }
  if (keys.status().ok() && n_shared == 0 && n_ff == 0)
    return keys.bad("metadata expert_shared_feed_forward_length is missing");
  return keys.status();
}

std::vector<bool> all_but_one_in(int64_t period, int64_t n_layer) {
  std::vector<bool> flags(static_cast<size_t>(n_layer));
  for (int64_t i = 0; i < n_layer; ++i) flags[static_cast<size_t>(i)] = i % period != period - 1;
  return flags;
}

void set_windows(ModelSpec& spec, int64_t window, const std::vector<bool>& flagged) {
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    if (!flagged[i]) continue;
    spec.layers[i].attention.window = window;
    spec.layers[i].attention.rope = 1;
  }
}

int64_t add_no_rope(ModelSpec& spec) {
  kernels::RopeParams still;
  still.n_rot = spec.ropes.front().n_rot;
  still.freq_scale = 0;
  spec.ropes.push_back(std::move(still));
  return static_cast<int64_t>(spec.ropes.size()) - 1;
}

Status read_granite_scales(KeyReader& keys, ModelSpec& spec) {
  const double logit = keys.real("logit_scale", std::nullopt, 1e-6, 1e6);
  const double residual = keys.real("residual_scale", 0.0, 0.0, 1e6);
  const double embedding = keys.real("embedding_scale", 0.0, 0.0, 1e6);
  const bool turns = keys.flag("rope.scaling.finetuned", true);
  if (!keys.status().ok()) return keys.status();
  spec.logit_scale = static_cast<float>(1 / logit);
  if (embedding != 0) spec.embedding_scale = static_cast<float>(embedding);
  const int64_t rope = turns ? 0 : add_no_rope(spec);
  for (LayerSpec& l : spec.layers) {
    if (residual != 0) l.residual_scale = static_cast<float>(residual);
    l.attention.rope = rope;
  }
  return {};
}

}  // namespace narrows
