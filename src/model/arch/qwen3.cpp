// Qwen3, dense: each head's q and k are normed.
#include "model/arch/architecture.h"

namespace narrows {

extern const Architecture qwen3_architecture = {"qwen3", [](KeyReader& keys, ModelSpec& spec) {
                                                  Status s = read_transformer(keys, spec, Experts::never);
                                                  for (LayerSpec& l : spec.layers) l.attention.qk_norm = true;
                                                  return s;
                                                }};

}  // namespace narrows
