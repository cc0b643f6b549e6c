// Grammars that an answer must follow: checking GBNF text before libllama's parser sees it, and GBNF out of a
// JSON schema by llama.cpp's own converter.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "narrows/status.h"
#include "sample/grammar_matcher.h"

namespace narrows {

/// ok if make_grammar() would make something of it. invalid_argument with the place where it goes wrong.
/// Token references (<|name|>) are not taken.
Status check_grammar(const std::string& gbnf);

/// At its beginning. Errors as check_grammar().
Result<std::unique_ptr<GrammarMatcher>> make_grammar(const std::string& gbnf);

/// GBNF for documents that the JSON schema allows. Patterns that the converter does not know allow any
/// string. invalid_argument with a sentence if the schema is none, if it uses anything else that the
/// converter does not know, if references lead back to themselves with nothing in between, or if it is too
/// large once they are followed.
Result<std::string> grammar_of_schema(const std::string& schema_json);

/// What has been converted of several schemas together, which share one bound.
struct SchemaWork {
  int64_t visits = 0, name_bytes = 0, steps = 0, rules = 0;
};

/// A tool's parameters as llama.cpp's common chat library can take them without a check of its own: the same
/// schema in plain words, its unknown patterns left out ("": no parameters at all). Errors as
/// grammar_of_schema(), and if it is no schema of an object.
Result<std::string> tool_parameters(const std::string& schema_json, SchemaWork& work);

}  // namespace narrows
