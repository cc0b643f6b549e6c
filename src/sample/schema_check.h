// JSON schemas and grammars before llama.cpp's converter and sampler meet them: both recurse along references
// without a bound, and some of their loops grow with the square, the cube or a power of what they are given.
// Here the same ways are walked first, with a budget.
#pragma once

#include <json-schema.h>
#include <llama-grammar.h>

#include <string>
#include <vector>

#include "narrows/status.h"
#include "sample/grammar.h"

namespace narrows {

/// References under the names that plain_schema() gave them.
struct SchemaReferences {
  std::string prefix;              ///< of all new names; a number follows
  std::vector<std::string> names;  ///< what the schema called them

  /// What the schema called a reference.
  std::string original(const std::string& reference) const;
  /// The same of all that stand in a text.
  std::string with_originals(std::string text) const;
};

/// First of all: what the converter does not understand or reads in another way than JSON Schema is said in
/// its way. References are decoded ("#" is the whole document), their targets copied to the end of the
/// document; `true` is the schema that allows all; items beside prefixItems ends the array; of two bounds of
/// a side the stricter one stays; patterns are anchored and spelled out (schema_pattern.h). References that
/// lead nowhere stay. invalid_argument with a sentence.
Status plain_schema(common_json& schema, SchemaReferences& references);

/// Before common_chat_schema_from_json(): the nodes that it would make, its depth, numbers that it would cut
/// off. ok for a schema that it refuses by itself. invalid_argument with a sentence.
Status check_schema(const common_json& schema);

/// Of one schema, part of check_schema(): numbers that the converter would cut off to 32 or 64 bits, or count
/// beyond their end; bounds that leave nothing. `type`: null if none is given.
Status check_numbers(const common_json& schema, const common_json* type);

/// Before json_schema_to_grammar(): circles that consume nothing, the depth and the work of the converter.
/// Changes the document so that it converts well: an allOf of one schema becomes that schema. Patterns are
/// those that plain_schema() made. invalid_argument with a sentence. `work`: what was converted before, and
/// afterwards with this; null: nothing.
Status prepare_schema(common_chat_schema_document& document, const SchemaReferences& references,
                      SchemaWork* work = nullptr);

/// Before a grammar is followed: rules that begin with themselves, through rules that may be empty too, long
/// chains of rules, more than kMaxWays ways to go on at one place. All rules that are referred to exist.
inline constexpr int kMaxWays = 4000;
Status check_rules(const llama_grammar_rules& rules);

}  // namespace narrows
