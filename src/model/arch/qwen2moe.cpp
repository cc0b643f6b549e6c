// Qwen2 with experts (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): weights are not normalised; a gated expert beside
// them that all rows go through.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  if (Status s = read_transformer(keys, spec, Experts::always); !s.ok()) return s;
  for (LayerSpec& l : spec.layers) l.ffn.experts.normalised = false;
  return read_shared_expert(keys, keys.integer("feed_forward_length", 0, 0, 1 << 22), spec);
}

}  // namespace

extern const Architecture qwen2moe_architecture = {"qwen2moe", read};

}  // namespace narrows
