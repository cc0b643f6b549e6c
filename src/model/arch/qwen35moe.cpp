// Qwen3.5 and 3.6 with experts (text): qwen35's layers, each with experts and a gated one beside them.
#include "model/arch/architecture.h"

namespace narrows {

extern const Architecture qwen35moe_architecture = {
    "qwen35moe", [](KeyReader& keys, ModelSpec& spec) {
      Status s = read_transformer(keys, spec, Experts::always);
      if (s.ok()) s = check_sections(keys, spec);
      if (s.ok()) s = read_shared_expert(keys, keys.integer("feed_forward_length", 0, 0, 1 << 22), spec);
      return s.ok() ? read_delta_net(keys, /*grouped=*/false, spec) : s;
    }};

}  // namespace narrows
