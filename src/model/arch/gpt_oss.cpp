// OpenAI's gpt-oss: experts in every layer, biases everywhere, every second layer with a window, and a score
// of each head's softmax that belongs to no token. (The softmax over the experts that were chosen alone is
// that over all of them, normalised.)
#include "model/arch/architecture.h"

namespace narrows {

extern const Architecture gpt_oss_architecture = {
    "gpt-oss", [](KeyReader& keys, ModelSpec& spec) {
      if (Status s = read_transformer(keys, spec, Experts::always); !s.ok()) return s;
      const int64_t window = keys.integer("attention.sliding_window", std::nullopt, 1, kMaxContext);
      const int64_t period = keys.integer("attention.sliding_window_pattern", 2, 1, 4096);
      kernels::RopeParams local = spec.ropes.front();
      local.freq_base = keys.real("rope.freq_base_swa", local.freq_base, 1e-3, 1e15);
      if (!keys.status().ok()) return keys.status();
      spec.ropes.push_back(std::move(local));
      set_windows(spec, window, all_but_one_in(period, spec.n_layer()));
      for (LayerSpec& l : spec.layers) {
        l.attention.sinks = true;
        l.ffn.activation = Activation::clamped;
        l.ffn_norm_is_post_attention = true;
      }
      return Status();
    }};

}  // namespace narrows
