// Qwen3.5 and 3.6, dense (text): three of four layers are gated DeltaNet, whose value heads take key heads in
// turn; the others attend with an output gate and a RoPE of a quarter of a head's coordinates, in sections.
#include "model/arch/architecture.h"

namespace narrows {

extern const Architecture qwen35_architecture = {
    "qwen35", [](KeyReader& keys, ModelSpec& spec) {
      Status s = read_transformer(keys, spec, Experts::never);
      if (s.ok()) s = check_sections(keys, spec);
      return s.ok() ? read_delta_net(keys, /*grouped=*/false, spec) : s;
    }};

}  // namespace narrows
