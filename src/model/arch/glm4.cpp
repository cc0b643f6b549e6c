// GLM-4 (0414): norms before and behind attention and feed-forward, gate and up in one tensor; the file
// rotates neighbours, a part of each head.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  spec.rope_neighbours = true;
  if (Status s = read_transformer(keys, spec, Experts::never); !s.ok()) return s;
  const int64_t n_predict = keys.integer("nextn_predict_layers", 0, 0, 4096);
  if (!keys.status().ok()) return keys.status();
  if (n_predict > 0) return keys.unsupported("layers that predict more tokens (nextn) are not supported");
  for (LayerSpec& l : spec.layers) {
    l.post_norms = true;
    l.ffn.gate_in_up = true;
  }
  return {};
}

}  // namespace

extern const Architecture glm4_architecture = {"glm4", read};

}  // namespace narrows
