// Mistral 3 (Ministral 3): YaRN, and queries that grow with the position beyond the context of the first
// training; the file rotates neighbours.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  spec.rope_neighbours = true;
  if (Status s = read_transformer(keys, spec, Experts::if_said); !s.ok()) return s;
  const double temperature = keys.real("attention.temperature_scale", 0.0, 0.0, 1e3);
  for (LayerSpec& l : spec.layers) {
    l.attention.temperature = temperature;
    l.attention.temperature_step = spec.ropes.front().n_ctx_orig;
  }
  return keys.status();
}

}  // namespace

extern const Architecture mistral3_architecture = {"mistral3", read};

}  // namespace narrows
