// A model's RoPE, other than its file says.
#pragma once

#include <string>

#include "model/spec.h"
#include "narrows/engine.h"
#include "narrows/status.h"

namespace narrows {

/// Changes the RoPE of the layers that see all (the first of spec's), and the context that the model allows
/// where a factor scales it: original context / freq_scale. Meanings as in llama.cpp (src/llama-context.cpp
/// of the pinned source), but that yarn_attn_factor counts with YaRN too. invalid_argument: a number out of
/// range.
Status override_rope(const RopeOverrides& wanted, ModelSpec& spec);

/// A text that tells overrides apart; empty if there are none.
std::string describe(const RopeOverrides& wanted);

}  // namespace narrows
