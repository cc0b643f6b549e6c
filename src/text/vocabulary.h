// libllama's vocabulary behind a Tokenizer, for what libllama does with it beside tokenizing: grammars.
#pragma once

#include "narrows/text.h"

struct llama_vocab;

namespace narrows {

/// Lives as long as the tokenizer.
const llama_vocab* vocabulary(const Tokenizer& tokenizer);

}  // namespace narrows
