// SmolLM3: every fourth layer has no RoPE; the file rotates neighbours.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  spec.rope_neighbours = true;
  if (Status s = read_transformer(keys, spec, Experts::never); !s.ok()) return s;
  const int64_t still = add_no_rope(spec);
  for (size_t i = 3; i < spec.layers.size(); i += 4) spec.layers[i].attention.rope = still;
  return {};
}

}  // namespace

extern const Architecture smollm3_architecture = {"smollm3", read};

}  // namespace narrows
