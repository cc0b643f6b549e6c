// Phi-3 and 4: q, k and v in one tensor, gate and up in one; RoPE's factors are others beyond the context of
// the first training. Its window is not used, as in llama.cpp (whose converter does not write it reliably).
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  Status s = read_transformer(keys, spec, Experts::never);
  for (LayerSpec& l : spec.layers) l.ffn.gate_in_up = true;
  return s;
}

}  // namespace

extern const Architecture phi3_architecture = {"phi3", read};

}  // namespace narrows
