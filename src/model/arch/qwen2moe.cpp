// Qwen2 with experts (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): weights are not normalised; a gated expert beside
// them that all rows go through.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  if (Status s = read_transformer(keys, spec, Experts::always); !s.ok()) return s;
  const int64_t n_ff = keys.integer("feed_forward_length", std::nullopt, 1, 1 << 22);
  const int64_t n_shared = keys.integer("expert_shared_feed_forward_length", 0, 0, 1 << 22);
  for (LayerSpec& l : spec.layers) {
    l.ffn.experts.normalised = false;
    l.ffn.experts.n_shared_ff = n_shared > 0 ? n_shared : n_ff;
    l.ffn.experts.shared_gate = true;
  }
  return keys.status();
}

}  // namespace

extern const Architecture qwen2moe_architecture = {"qwen2moe", read};

}  // namespace narrows
