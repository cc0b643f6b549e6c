// OLMo 2 and 3: norms behind attention and feed-forward and none before, q and k normed over all heads
// together; in OLMo 3 three layers of four see a window, with a RoPE that is not scaled.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  if (Status s = read_transformer(keys, spec, Experts::never); !s.ok()) return s;
  const int64_t window = keys.integer("attention.sliding_window", 0, 0, int64_t{1} << 30);
  // Which layers have the window: one by one, or all but one in so many.
  const std::vector<bool> windows = keys.flags("attention.sliding_window_pattern", spec.n_layer());
  const int64_t period =
      windows.empty() ? keys.integer("attention.sliding_window_pattern", 4, 1, 4096) : spec.n_layer() + 1;
  if (!keys.status().ok()) return keys.status();
  if (window > 0) {
    kernels::RopeParams plain;
    plain.n_rot = spec.ropes.front().n_rot;
    plain.freq_base = spec.ropes.front().freq_base;
    spec.ropes.push_back(std::move(plain));
  }
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    LayerSpec& l = spec.layers[i];
    l.pre_norms = false;
    l.post_norms = true;
    l.attention.qk_norm = l.attention.qk_norm_whole = true;
    const bool windowed = windows.empty() ? static_cast<int64_t>(i) % period != period - 1 : windows[i];
    if (window == 0 || !windowed) continue;
    l.attention.window = window;
    l.attention.rope = 1;
  }
  return {};
}

}  // namespace

extern const Architecture olmo2_architecture = {"olmo2", read};

}  // namespace narrows
