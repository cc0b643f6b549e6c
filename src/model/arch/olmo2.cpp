// OLMo 2 and 3: norms behind attention and feed-forward and none before, q and k normed over all heads
// together; in OLMo 3 three layers of four see a window, with a RoPE that is not scaled.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  if (Status s = read_transformer(keys, spec, Experts::never); !s.ok()) return s;
  const int64_t window = keys.integer("attention.sliding_window", 0, 0, int64_t{1} << 30);
  // Which layers have the window: one by one, or all but one in so many.
  std::vector<bool> windows = keys.flags("attention.sliding_window_pattern", spec.n_layer());
  if (windows.empty())
    windows = all_but_one_in(keys.integer("attention.sliding_window_pattern", 4, 1, 4096), spec.n_layer());
  if (!keys.status().ok()) return keys.status();
  if (window > 0) {
    kernels::RopeParams plain;
    plain.n_rot = spec.ropes.front().n_rot;
    plain.freq_base = spec.ropes.front().freq_base;
    spec.ropes.push_back(std::move(plain));
    set_windows(spec, window, windows);
  }
  for (LayerSpec& l : spec.layers) {
    l.pre_norms = false;
    l.post_norms = true;
    l.attention.qk_norm = l.attention.qk_norm_whole = true;
  }
  return {};
}

}  // namespace

extern const Architecture olmo2_architecture = {"olmo2", read};

}  // namespace narrows
