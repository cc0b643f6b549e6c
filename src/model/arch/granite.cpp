// Granite 3 and 4, dense: embeddings, what layers add and logits are scaled; the file rotates neighbours.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  spec.rope_neighbours = true;
  if (Status s = read_transformer(keys, spec, Experts::never); !s.ok()) return s;
  return read_granite_scales(keys, spec);
}

}  // namespace

extern const Architecture granite_architecture = {"granite", read};

}  // namespace narrows
