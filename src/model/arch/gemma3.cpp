// Gemma 3, text: most layers see a window of tokens with a RoPE of their own, one in six sees all; heads' q
// and k are normed, and so is what attention and the feed-forward give.
#include <cmath>

#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  if (Status s = read_transformer(keys, spec, Experts::never); !s.ok()) return s;
  const AttentionSpec common = spec.layers.front().attention;
  const int64_t window = keys.integer("attention.sliding_window", 0, 0, int64_t{1} << 30);
  const int64_t period = keys.integer("attention.sliding_window_pattern", 6, 1, 4096);
  kernels::RopeParams local;
  local.n_rot = spec.ropes.front().n_rot;
  local.freq_base = keys.real("rope.freq_base_swa", 10000.0, 1e-3, 1e15);
  if (keys.real("final_logit_softcapping", 0, 0, 1e6) != 0 && keys.status().ok())
    return keys.unsupported("a soft cap on the logits is not supported");
  if (!keys.status().ok()) return keys.status();
  spec.embedding_scale = std::sqrt(static_cast<float>(spec.n_embd));
  spec.ropes.push_back(std::move(local));
  // The 27B model scales by the width of a head that its embedding would give, not by the heads' own.
  const bool of_embedding = spec.n_layer() == 62;
  const int64_t scaled_by = of_embedding ? spec.n_embd / common.n_head : common.head_dim;
  for (LayerSpec& layer : spec.layers) {
    layer.attention.qk_norm = true;
    layer.attention.scale = 1 / std::sqrt(static_cast<float>(scaled_by));
    layer.ffn.activation = Activation::gelu;
    layer.post_norms = true;
  }
  if (window > 0) set_windows(spec, window, all_but_one_in(period, spec.n_layer()));
  return {};
}

}  // namespace

extern const Architecture gemma3_architecture = {"gemma3", read};

}  // namespace narrows
