// Llama, Mistral, Mixtral, SmolLM and others; the file rotates neighbours.
#include "model/arch/architecture.h"

namespace narrows {

extern const Architecture llama_architecture = {"llama", [](KeyReader& keys, ModelSpec& spec) {
                                                  spec.rope_neighbours = true;
                                                  return read_transformer(keys, spec, Experts::if_said);
                                                }};

}  // namespace narrows
