// Grammars that an answer must follow: checking GBNF text before libllama sees it, and GBNF out of a JSON
// schema by llama.cpp's own converter.
#pragma once

#include <string>
#include <string_view>

#include "narrows/status.h"

namespace narrows {

/// ok if libllama can build a sampler from it. invalid_argument with the place where it goes wrong. Token
/// references (<|name|>) are not taken.
Status check_grammar(const std::string& gbnf);

/// GBNF for documents that the JSON schema allows. invalid_argument if the schema is none, or uses what the
/// converter does not know.
Result<std::string> grammar_of_schema(const std::string& schema_json);

}  // namespace narrows
