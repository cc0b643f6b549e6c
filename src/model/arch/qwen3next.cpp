// Qwen3-Next: gated DeltaNet in three of four layers, whose value heads of one key head stand together;
// experts in all, and a gated one beside them; a plain RoPE of a quarter of a head's coordinates.
#include "model/arch/architecture.h"

namespace narrows {

extern const Architecture qwen3next_architecture = {
    "qwen3next", [](KeyReader& keys, ModelSpec& spec) {
      Status s = read_transformer(keys, spec, Experts::always);
      if (s.ok()) s = read_shared_expert(keys, keys.integer("feed_forward_length", 0, 0, 1 << 22), spec);
      return s.ok() ? read_delta_net(keys, /*grouped=*/true, spec) : s;
    }};

}  // namespace narrows
