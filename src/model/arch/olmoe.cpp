// OLMoE: experts whose weights are not normalised; q and k are normed over all heads together.
#include "model/arch/architecture.h"

namespace narrows {

namespace {

Status read(KeyReader& keys, ModelSpec& spec) {
  Status s = read_transformer(keys, spec, Experts::always);
  for (LayerSpec& l : spec.layers) {
    l.ffn.experts.normalised = false;
    l.attention.qk_norm = l.attention.qk_norm_whole = true;
  }
  return s;
}

}  // namespace

extern const Architecture olmoe_architecture = {"olmoe", read};

}  // namespace narrows
