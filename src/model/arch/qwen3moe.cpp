// Qwen3 with experts in every layer (30B-A3B, 235B-A22B, Coder): softmax over all, the best normalised.
#include "model/arch/architecture.h"

namespace narrows {

extern const Architecture qwen3moe_architecture = {"qwen3moe", [](KeyReader& keys, ModelSpec& spec) {
                                                     Status s = read_transformer(keys, spec, Experts::always);
                                                     for (LayerSpec& l : spec.layers)
                                                       l.attention.qk_norm = true;
                                                     return s;
                                                   }};

}  // namespace narrows
