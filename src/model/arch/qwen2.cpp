// Qwen2 and 2.5; their biases on q, k and v are there because the file has them.
#include "model/arch/architecture.h"

namespace narrows {

extern const Architecture qwen2_architecture = {
    "qwen2", [](KeyReader& keys, ModelSpec& spec) { return read_transformer(keys, spec, Experts::never); }};

}  // namespace narrows
