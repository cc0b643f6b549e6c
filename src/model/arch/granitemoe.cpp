// Granite with experts in every layer, of some models with one beside them that all rows go through.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  spec.rope_neighbours = true;
  if (Status s = read_transformer(keys, spec, Experts::if_said); !s.ok()) return s;
  const int64_t n_shared = keys.integer("expert_shared_feed_forward_length", 0, 0, 1 << 22);
  for (LayerSpec& l : spec.layers) l.ffn.experts.n_shared_ff = l.ffn.experts ? n_shared : 0;
  return read_granite_scales(keys, spec);
}

}  // namespace

extern const Architecture granitemoe_architecture = {"granitemoe", read};

}  // namespace narrows
