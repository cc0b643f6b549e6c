// A text with a gap, in the words that models for code are taught (fill in the middle).
#pragma once

#include <string>

#include "narrows/text.h"

namespace narrows {

/// The file's FIM tokens around what stands before and behind the gap; the answer goes on with `begun`.
/// Control tokens in the three texts are text. unsupported if the vocabulary has no such tokens.
Result<ChatPrompt> infill_prompt(const Tokenizer& tokenizer, const std::string& before,
                                 const std::string& behind, const std::string& begun);

}  // namespace narrows
