// Grammars that an answer must follow: checking GBNF text before libllama sees it, and GBNF out of a JSON
// schema by llama.cpp's own converter.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "narrows/status.h"

struct llama_grammar;
struct llama_vocab;

namespace narrows {

/// ok if libllama can build a sampler from it. invalid_argument with the place where it goes wrong. Token
/// references (<|name|>) are not taken.
Status check_grammar(const std::string& gbnf);

struct GrammarDeleter {
  void operator()(llama_grammar* grammar) const;
};
using LlamaGrammar = std::unique_ptr<llama_grammar, GrammarDeleter>;

/// At its beginning. Errors as check_grammar(). The vocabulary outlives it.
Result<LlamaGrammar> make_grammar(const std::string& gbnf, const llama_vocab* vocabulary);

/// GBNF for documents that the JSON schema allows. Patterns that the converter does not know allow any
/// string. invalid_argument with a sentence if the schema is none, if it uses anything else that the
/// converter does not know, if references lead back to themselves with nothing in between, or if it is too
/// large once they are followed.
Result<std::string> grammar_of_schema(const std::string& schema_json);

}  // namespace narrows
