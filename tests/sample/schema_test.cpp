// Schemas and grammars that would end the process, the memory or the patience: each is refused in a sentence
// or converted, at once, and nothing is printed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <string>

#include "sample/grammar.h"

namespace narrows {
namespace {

using ::testing::HasSubstr;

std::string repeat(int n, const std::function<std::string(int)>& text, const char* between = ",") {
  std::string all;
  for (int i = 0; i < n; ++i) all += (i > 0 ? between : "") + text(i);
  return all;
}

/// "" if it is converted. Nothing may be printed, and 64 KB may not take 2 s (20 s here: machines are busy
/// and builds are slow).
std::string refusal(const std::string& schema) {
  ::testing::internal::CaptureStderr();
  const auto begin = std::chrono::steady_clock::now();
  const Result<std::string> grammar = grammar_of_schema(schema);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20)) << schema.substr(0, 200);
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "") << schema.substr(0, 200);
  if (grammar.ok()) return "";
  EXPECT_EQ(grammar.status().code(), StatusCode::invalid_argument) << schema.substr(0, 200);
  EXPECT_EQ(grammar.status().message().find('\n'), std::string::npos);
  EXPECT_FALSE(grammar.status().message().empty());
  return grammar.status().message();
}

// docs/server_api.md: "References that lead back to themselves with nothing in between"
TEST(Schema, CirclesThatConsumeNothingAreRefusedByName) {
  for (
      const char* circle : {
          R"({"$defs":{"a":{"$ref":"#/$defs/a"}},"allOf":[{"$ref":"#/$defs/a"}]})",
          R"({"$defs":{"a":{"$ref":"#/$defs/a"}},"$ref":"#/$defs/a"})",
          R"({"$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}},"anyOf":[{"type":"null"},{"$ref":"#/$defs/a"}]})",
          R"({"$defs":{"a":{"anyOf":[{"type":"string"},{"$ref":"#/$defs/a"}]}},"$ref":"#/$defs/a"})",
          R"({"$defs":{"a":{"oneOf":[{"allOf":[{"$ref":"#/$defs/a"}]}]}},"type":"array","items":{"$ref":"#/$defs/a"}})",
          R"({"$defs":{"a":{"allOf":[{"$ref":"#/$defs/a"},{"type":"object"}]}},"properties":{"x":{"$ref":"#/$defs/a"}}})",
          R"({"$defs":{"a":{"allOf":[{"anyOf":[{"$ref":"#/$defs/a"}]},{"type":"object"}]}},"additionalProperties":{"$ref":"#/$defs/a"}})",
          R"({"$defs":{"a":{"allOf":[{"$ref":"#/$defs/a"}],"type":"string"}},"prefixItems":[{"$ref":"#/$defs/a"}]})",
          R"({"properties":{"x":{"properties":{"y":{"$ref":"#/properties/x/properties/y"}}}}})",
          R"({"type":["object","null"],"properties":{"x":{"anyOf":[{"$ref":"#/properties/x"},{"type":"null"}]}}})",
      }) {
    const std::string why = refusal(circle);
    EXPECT_THAT(why, HasSubstr("leads back to itself with nothing in between")) << circle;
    EXPECT_THAT(why, HasSubstr("#/")) << circle;
  }
  // Not used: no harm.
  EXPECT_EQ(refusal(R"({"$defs":{"a":{"$ref":"#/$defs/a"}},"type":"object"})"), "");
}

TEST(Schema, TreesThatConsumeStayAllowed) {
  for (
      const char* tree : {
          R"({"$defs":{"n":{"type":"object","properties":{"v":{"type":"integer"},"next":{"$ref":"#/$defs/n"}},"required":["v"]}},"$ref":"#/$defs/n"})",
          R"({"$defs":{"n":{"type":"array","items":{"$ref":"#/$defs/n"}}},"$ref":"#/$defs/n"})",
          R"({"$defs":{"n":{"anyOf":[{"type":"null"},{"type":"object","properties":{"l":{"$ref":"#/$defs/n"},"r":{"$ref":"#/$defs/n"}}}]}},"$ref":"#/$defs/n"})",
          R"({"$defs":{"n":{"type":["object","null"],"properties":{"l":{"$ref":"#/$defs/n"}},"additionalProperties":{"$ref":"#/$defs/n"}}},"$ref":"#/$defs/n"})",
          R"({"$defs":{"n":{"properties":{"parent":{"allOf":[{"$ref":"#/$defs/n"}]}}}},"allOf":[{"$ref":"#/$defs/n"}]})",
          R"({"$defs":{"n":{"prefixItems":[{"type":"string"},{"anyOf":[{"$ref":"#/$defs/n"},{"type":"null"}]}]}},"$ref":"#/$defs/n"})",
      })
    EXPECT_EQ(refusal(tree), "") << tree;
  EXPECT_THAT(
      refusal(
          R"({"$defs":{"n":{"properties":{"x":{"allOf":[{"$ref":"#/$defs/n"},{"type":"object"}]}}}},"$ref":"#/$defs/n"})"),
      HasSubstr("allOf"));
}

// docs/server_api.md: "schemas that grow too large once references are followed"
TEST(Schema, LaughsAreNotMultiplied) {
  const auto defs = [](int n, const std::function<std::string(int)>& def) {
    return "{\"$defs\":{" + repeat(n, [&](int i) { return "\"a" + std::to_string(i) + "\":" + def(i); }) +
           ",\"a" + std::to_string(n) + "\":{\"type\":\"null\"}},\"$ref\":\"#/$defs/a0\"}";
  };
  const auto next = [](int i) { return "{\"$ref\":\"#/$defs/a" + std::to_string(i + 1) + "\"}"; };
  // Parts of an allOf are written out again wherever it stands.
  EXPECT_NE(
      refusal(defs(
          40, [&](int i) { return R"({"properties":{"x":{"allOf":[)" + next(i) + "," + next(i) + "]}}}"; })),
      "");
  // The rules that begin with others are walked again each time.
  EXPECT_THAT(refusal(defs(60, [&](int i) { return "{\"anyOf\":[" + next(i) + "," + next(i) + "]}"; })),
              HasSubstr("grammar cannot be used"));
  std::string types = R"({"type":"null"})";
  for (int i = 0; i < 28; ++i)
    types = R"({"type":["object","object","object"],"properties":{"x":)" + types + "}}";
  EXPECT_THAT(refusal(types), HasSubstr("too large"));
  EXPECT_THAT(refusal(defs(1500, [&](int i) { return "{\"items\":" + next(i) + "}"; })),
              HasSubstr("nested deeper"));
  EXPECT_EQ(
      refusal(
          "{\"$defs\":{" +
          repeat(90, [&](int i) { return "\"a" + std::to_string(i) + "\":{\"items\":" + next(i) + "}"; }) +
          R"(,"a90":{"type":"null"}},"$ref":"#/$defs/a0"})"),
      "");
}

TEST(Schema, ManyPropertiesAndNamesAreBounded) {
  const auto object = [](int n, const std::function<std::string(int)>& name, const char* rest = "") {
    return "{\"type\":\"object\",\"properties\":{" +
           repeat(n, [&](int i) { return "\"" + name(i) + R"(":{"type":"integer"})"; }) + "}" + rest + "}";
  };
  const auto plain = [](int i) { return "p" + std::to_string(i); };
  EXPECT_EQ(refusal(object(100, plain)), "");
  EXPECT_THAT(refusal(object(2000, plain)), HasSubstr("2000 optional properties"));
  std::string required = ",\"required\":[" + repeat(400, [&](int i) { return "\"" + plain(i) + "\""; }) + "]";
  EXPECT_EQ(refusal(object(400, plain, required.c_str())), "");
  // Names of no letter that a rule may have.
  EXPECT_EQ(refusal(object(50, [](int i) { return std::string(static_cast<size_t>(i) + 1, '!'); })), "");
  (void)refusal(object(300, [](int i) { return std::string(static_cast<size_t>(i) + 1, '!'); }));
  EXPECT_THAT(refusal(object(1, [](int) { return std::string(60'000, '!'); })), HasSubstr("60000 bytes"));
  EXPECT_THAT(refusal("{\"$defs\":[{}],\"$ref\":\"#/$defs/" + std::string(60'000, ' ') + "0\"}"),
              HasSubstr("$ref has"));
  (void)refusal(object(
      1, [](int) { return std::string(900, 'a'); }, R"(,"additionalProperties":{"type":"null"})"));
  std::string patterns;
  (void)refusal("{\"prefixItems\":[" +
                repeat(2000, [](int i) { return R"({"pattern":"^a)" + std::to_string(i) + "$\"}"; }) + "]}");
  (void)refusal("{\"enum\":[" + repeat(12'000, [](int i) { return std::to_string(i % 10); }) + "]}");
}

TEST(Schema, NumbersThatDoNotFitAreRefused) {
  for (const char* schema : {
           R"({"type":"string","minLength":4294967297})",
           R"({"type":"string","maxLength":1e300})",
           R"({"type":"array","minItems":-1})",
           R"({"type":"integer","minimum":1e300})",
           R"({"type":"integer","maximum":-9223372036854775808})",
           R"({"type":"integer","exclusiveMinimum":9223372036854775807})",
           R"({"type":"integer","minimum":18446744073709551615})",
           R"({"type":"integer","minimum":9e15})",
           R"({"type":"string","minLength":2001})",
           R"({"type":"string","pattern":"^a{5,2}$"})",
           R"({"type":"string","pattern":"^a{-5}$"})",
           R"({"type":"string","pattern":"^(a$"})",
           R"({"type":"string","pattern":"^*$"})",
       })
    EXPECT_NE(refusal(schema), "") << schema;
  for (const char* schema :
       {R"({"type":"integer","minimum":-999999999999999,"maximum":999999999999999})",
        // Of generators that write the ends of their integers.
        R"({"type":"integer","minimum":-9007199254740991,"maximum":9007199254740991})",
        R"({"type":"integer","minimum":-9223372036854775808,"maximum":9223372036854775807})",
        R"({"type":"integer","minimum":0,"maximum":9223372036854775807})",
        R"({"type":"integer","minimum":7})", R"({"type":"integer","exclusiveMaximum":-3.5})",
        R"({"type":"number","minimum":1e300})"})
    EXPECT_EQ(refusal(schema), "") << schema;
}

// Log lines could be forged with a newline in it: llama.cpp prints a pattern that it does not know.
// docs/server_api.md: "one that has anything else is refused by name"
TEST(Schema, PatternsAreFollowedOrRefused) {
  const auto schema = [](const std::string& pattern) {
    return R"({"type":"string","maxLength":3,"pattern":")" + pattern + "\"}";
  };
  for (const char* pattern : {"abc", "^\\\\d+$", "^ab+$"}) {
    EXPECT_EQ(refusal(schema(pattern)), "") << pattern;
    EXPECT_NE(*grammar_of_schema(schema(pattern)), *grammar_of_schema(R"({"type":"string","maxLength":3})"));
  }
  EXPECT_THAT(refusal(schema("^(?=a)b$")), HasSubstr("look ahead"));
  EXPECT_THAT(refusal(schema("^a\\n{\\\"event\\\":\\\"x\\\"}\\\\w$")), HasSubstr("no regular expression"));
  EXPECT_THAT(refusal(schema("^" + std::string(20'000, '(') + "$")), HasSubstr("longer than"));
  // Of a type that no string has, it says nothing.
  EXPECT_EQ(refusal(R"({"type":"integer","pattern":"^(?=a)b$"})"), "");
  // In tools too, as llama.cpp's chat library gets them.
  SchemaWork work;
  EXPECT_THAT(
      *tool_parameters(R"({"type":"object","properties":{"d":{"type":"string","pattern":"\\d"}}})", work),
      HasSubstr("[0-9]"));
}

// Names that look alike once their other letters are gone are not the same.
TEST(Schema, ReferencesAreNotMixedUp) {
  const auto grammar = grammar_of_schema(
      R"({"$defs":{"节点":{"const":"first"},"叶子":{"const":"second"}},
          "prefixItems":[{"$ref":"#/$defs/节点"},{"$ref":"#/$defs/叶子"}]})");
  ASSERT_TRUE(grammar.ok()) << grammar.status().message();
  EXPECT_THAT(*grammar, HasSubstr("first"));
  EXPECT_THAT(*grammar, HasSubstr("second"));
}

/// Whether the answer may be the text.
bool allows(const std::string& schema, const std::string& text) {
  const Result<std::string> gbnf = grammar_of_schema(schema);
  EXPECT_TRUE(gbnf.ok()) << schema << gbnf.status().message();
  if (!gbnf.ok()) return false;
  const auto grammar = make_grammar(*gbnf);
  EXPECT_TRUE(grammar.ok()) << schema;
  return grammar.ok() && (*grammar)->accept(text).ok() && (*grammar)->may_end();
}

// docs/server_api.md: "$ref may be # (the whole schema) or a JSON pointer with ~0, ~1 and %XX"
TEST(Schema, TheRootRefersToItself) {
  for (
      const char* tree :
      {R"({"type":"object","properties":{"kids":{"type":"array","items":{"$ref":"#"}}},"required":["kids"]})",
       R"({"$defs":{"a":{"$ref":"#"}},"type":["object"],"properties":{"kids":{"items":{"$ref":"#/$defs/a"}}},"required":["kids"]})"}) {
    EXPECT_TRUE(allows(tree, R"({"kids":[]})")) << tree;
    EXPECT_TRUE(allows(tree, R"({"kids":[{"kids":[]},{"kids":[{"kids":[]}]}]})")) << tree;
    EXPECT_FALSE(allows(tree, R"({"kids":[1]})")) << tree;
  }
  for (const char* circle : {R"({"$ref":"#"})", R"({"allOf":[{"$ref":"#"}]})",
                             R"({"anyOf":[{"type":"null"},{"$ref":"#/anyOf/2"},{"$ref":"#"}]})",
                             R"({"type":"array","items":{"$ref":"#/items"}})"})
    EXPECT_THAT(refusal(circle), HasSubstr("leads back to itself")) << circle;
}

TEST(Schema, JsonPointersAreDecoded) {
  // The names of definitions, as they are and as references to them are written.
  for (const auto& [name, pointer] :
       {std::pair{"a/b", "a~1b"}, std::pair{"a~b", "a~0b"}, std::pair{"~1", "~01"}, std::pair{"a b", "a%20b"},
        std::pair{"ü", "%C3%BC"}, std::pair{"ü", "ü"}, std::pair{"a/b", "a%7E1b"}, std::pair{"", ""},
        std::pair{"a%20b", "a%2520b"}, std::pair{"a%20b", "a%20b"}, std::pair{"100%", "100%"},
        std::pair{"x~", "x~"}, std::pair{"narrows-references", "narrows-references"}}) {
    const std::string definitions = std::string("{\"") + name + R"(":{"const":"here"}})";
    const std::string references = std::string(R"("properties":{"v":{"$ref":"#/$defs/)") + pointer + "\"}}";
    const std::string schema =
        R"({"$defs":)" + definitions + "," + references + R"(,"required":["v"],"narrows-references":[1]})";
    EXPECT_TRUE(allows(schema, R"({"v":"here"})")) << schema;
    EXPECT_FALSE(allows(schema, R"({"v":"other"})")) << schema;
  }
  // Decoded before it is split.
  EXPECT_TRUE(allows(R"({"$defs":{"a":{"b":{"const":1}}},"$ref":"#/$defs/a%2Fb"})", "1"));
  // The decoded name goes before one that looks the same.
  EXPECT_TRUE(allows(R"({"$defs":{"a b":{"const":1},"a%20b":{"const":2}},"$ref":"#/$defs/a%20b"})", "1"));
  EXPECT_TRUE(allows(R"({"$defs":[{"const":1},{"const":2}],"$ref":"#/$defs/1"})", "2"));
  // Reasons call references as the schema does.
  EXPECT_THAT(refusal(R"({"$defs":{"a/b":{"type":"strin"}},"$ref":"#/$defs/a~1b"})"),
              HasSubstr("at #/$defs/a~1b: unrecognized type strin"));
}

// docs/server_api.md: "Some schemas are taken more strictly than they must"; "a list of prefixItems (or
// items) ends the array, whatever items or additionalItems say."
TEST(Schema, PrefixItemsEndTheArray) {
  for (const char* rest : {R"(,"items":false)", "", R"(,"items":true)", R"(,"items":{"type":"null"})"}) {
    const std::string schema =
        std::string(R"({"type":"array","prefixItems":[{"const":1},{"const":2}])") + rest + "}";
    EXPECT_TRUE(allows(schema, "[1,2]")) << schema;
    EXPECT_FALSE(allows(schema, "[1,2,2]")) << schema;
    EXPECT_FALSE(allows(schema, "[null]")) << schema;
  }
  EXPECT_TRUE(allows(R"({"items":false})", "[]"));
  EXPECT_FALSE(allows(R"({"items":false})", "[1]"));
  EXPECT_TRUE(allows(R"({"type":"array","items":true})", "[1,\"a\"]"));
  EXPECT_TRUE(allows(R"({"properties":{"a":true},"required":["a"]})", "{\"a\":[1]}"));
  EXPECT_TRUE(allows(R"({"prefixItems":[{"const":1},{"const":2}],"maxItems":1})", "[1]"));
  EXPECT_THAT(refusal(R"({"prefixItems":[{"const":1}],"minItems":2,"items":{"type":"null"}})"),
              HasSubstr("minItems"));
}

TEST(Schema, TheStricterBoundOfASideHolds) {
  for (const char* schema :
       {R"({"type":"integer","minimum":0,"exclusiveMinimum":5,"maximum":9})",
        R"({"type":"integer","minimum":6,"exclusiveMinimum":2,"maximum":20,"exclusiveMaximum":10})",
        R"({"type":"integer","minimum":5,"exclusiveMinimum":true,"maximum":9,"exclusiveMaximum":false})"}) {
    EXPECT_FALSE(allows(schema, "5")) << schema;
    EXPECT_TRUE(allows(schema, "6")) << schema;
    EXPECT_TRUE(allows(schema, "9")) << schema;
  }
}

// They failed when the first token was drawn.
// docs/server_api.md: "Bounds that leave nothing are refused."
TEST(Schema, WhatLeavesNothingIsRefused) {
  for (const char* schema : {
           R"({"type":"integer","exclusiveMinimum":5,"exclusiveMaximum":5})",
           R"({"type":"integer","exclusiveMinimum":5,"exclusiveMaximum":6})",
           R"({"type":"integer","minimum":5,"exclusiveMaximum":5})",
           R"({"type":"integer","exclusiveMinimum":5,"maximum":5})",
           R"({"type":"integer","minimum":5.2,"maximum":5.8})",
           R"({"type":"integer","minimum":5,"exclusiveMinimum":true,"maximum":5})",
           R"({"type":"integer","exclusiveMinimum":9007199254740993,"exclusiveMaximum":9007199254740994})",
           R"({"type":"number","exclusiveMinimum":5,"exclusiveMaximum":5})",
           R"({"type":"number","minimum":5,"maximum":4.5})",
           R"({"type":["integer"],"minimum":5,"maximum":4})",
           R"({"type":"string","minLength":3,"maxLength":2})",
           R"({"type":"array","minItems":1,"maxItems":0})",
           R"({"type":"array","items":false,"minItems":1})",
           R"({"type":"string","pattern":"^[z-a]$"})",
           R"({"properties":{"a":false}})",
       })
    EXPECT_NE(refusal(schema), "") << schema;
  EXPECT_THAT(refusal(R"({"type":"integer","exclusiveMinimum":5,"exclusiveMaximum":6})"),
              HasSubstr("no integer is from above 5 to below 6"));
  EXPECT_TRUE(allows(R"({"type":"integer","exclusiveMinimum":5,"exclusiveMaximum":7})", "6"));
  EXPECT_TRUE(allows(R"({"type":"integer","exclusiveMinimum":4.5,"exclusiveMaximum":5.5})", "5"));
  EXPECT_TRUE(
      allows(R"({"type":"integer","exclusiveMinimum":9007199254740992,"exclusiveMaximum":9007199254740994})",
             "9007199254740993"));
  EXPECT_EQ(refusal(R"({"type":"number","minimum":5,"maximum":5})"), "");
}

// The root's own rule was replaced by that of the property.
TEST(Schema, EmptyNamesAndEmptyRangesAreRefused) {
  EXPECT_THAT(refusal(R"({"type":"object","properties":{"":{"type":"null"},"z":{"type":"boolean"}}})"),
              HasSubstr("empty name"));
  EXPECT_THAT(refusal(R"({"type":"integer","minimum":5,"maximum":1})"),
              HasSubstr("no integer is from 5 to 1"));
  EXPECT_EQ(refusal(R"({"type":"integer","minimum":5,"maximum":5})"), "");
}

// docs/server_api.md: "Not enforced are minimum, maximum, exclusiveMinimum and exclusiveMaximum of numbers
// that are no integers" docs/server_api.md: "multipleOf, uniqueItems, minProperties, maxProperties,
// patternProperties, propertyNames, contains, not, if, dependentRequired, and required names without a
// property"
TEST(Schema, WhatIsNotEnforcedIsTheSameGrammar) {
  const auto same = [](const std::string& with, const std::string& without) {
    const auto a = grammar_of_schema(with), b = grammar_of_schema(without);
    ASSERT_TRUE(a.ok() && b.ok()) << with << a.status().message() << b.status().message();
    EXPECT_EQ(*a, *b) << with;
  };
  for (const char* word :
       {R"("minimum":0)", R"("maximum":1)", R"("exclusiveMinimum":0)", R"("exclusiveMaximum":1)",
        R"("multipleOf":0.5)", R"("not":{"const":1})", R"("if":{})"})
    same(std::string(R"({"type":"number",)") + word + "}", R"({"type":"number"})");
  for (const char* word : {R"("uniqueItems":true)", R"("contains":{"const":1})"})
    same(std::string(R"({"type":"array","items":{"type":"integer"},)") + word + "}",
         R"({"type":"array","items":{"type":"integer"}})");
  for (const char* word :
       {R"("minProperties":1)", R"("maxProperties":1)", R"("patternProperties":{"^x":{"type":"null"}})",
        R"("propertyNames":{"maxLength":3})", R"("dependentRequired":{"a":["b"]})",
        R"("required":["other"])"})
    same(std::string(R"({"type":"object","properties":{"a":{"type":"integer"}},)") + word + "}",
         R"({"type":"object","properties":{"a":{"type":"integer"}}})");
}

// docs/server_api.md: "Nor are then, else, dependentSchemas"
// docs/server_api.md: "whatever stands beside $ref, anyOf or oneOf"
// docs/server_api.md: "number bounds, required, minItems and maxItems of a schema that has no type"
// docs/server_api.md: "in an allOf of several all but their properties"
// docs/server_api.md: "lengths and format beside pattern, lengths beside those formats"; "that only one of
// oneOf matches"; "allOf beside properties or additionalProperties"
// docs/server_api.md: "$anchor, $id and $dynamicRef are not followed."
TEST(Schema, WhatElseIsNotEnforcedIsTheSameGrammar) {
  const auto same = [](const std::string& schema, const std::string& words) {
    const auto with = grammar_of_schema("{" + schema + "," + words + "}"),
               without = grammar_of_schema("{" + schema + "}");
    ASSERT_TRUE(with.ok() && without.ok()) << schema << words << with.status().message();
    EXPECT_EQ(*with, *without) << schema << words;
  };
  const std::string object = R"("type":"object","properties":{"a":{"type":"integer"}})";
  for (const char* word : {R"("then":{"required":["a"]})", R"("else":{"required":["a"]})",
                           R"("dependentSchemas":{"a":{"required":["b"]}})", R"("dependencies":{"a":["b"]})",
                           R"("unevaluatedProperties":{"type":"null"})", R"("allOf":[{"required":["a"]}])",
                           R"("additionalProperties":false)"})
    same(object, word);
  for (const char* word : {R"("minContains":1)", R"("maxContains":1)", R"("unevaluatedItems":false)",
                           R"("additionalItems":false)"})
    same(R"("type":"array","items":{"type":"integer"})", word);
  for (const char* word :
       {R"("format":"email")", R"("contentEncoding":"base64")", R"("contentMediaType":"text/html")"})
    same(R"("type":"string","maxLength":9)", word);
  for (const char* word : {R"("minLength":9)", R"("maxLength":1)", R"("format":"date")"})
    same(R"("type":"string","pattern":"^ab+$")", word);
  same(R"("type":"string","format":"date")", R"("maxLength":1)");
  for (const char* word :
       {R"("minimum":1)", R"("exclusiveMaximum":1)", R"("multipleOf":2)", R"("required":["a"])",
        R"("minItems":1)", R"("maxItems":1)", R"("$anchor":"a")", R"("$id":"a")", R"("$dynamicRef":"#a")"})
    same(R"("title":"x")", word);
  for (const char* first :
       {R"("$defs":{"a":{"type":"object"}},"$ref":"#/$defs/a")",
        R"("anyOf":[{"type":"object"},{"type":"null"}])", R"("oneOf":[{"type":"object"},{"type":"null"}])",
        R"("enum":[{},null])", R"("const":{})"}) {
    same(first, R"("properties":{"b":{"type":"null"}},"required":["b"])");
    same(first, R"("allOf":[{"type":"null"}])");
  }
  same(R"("oneOf":[{"type":"object"},{"type":"null"}])", R"("anyOf":[{"type":"integer"}])");
  same(R"("const":1)", R"("type":"string")");
  same(R"("enum":[1])", R"("type":"string")");
  EXPECT_EQ(*grammar_of_schema(R"({"oneOf":[{"type":"integer"},{"type":"number"}]})"),
            *grammar_of_schema(R"({"anyOf":[{"type":"integer"},{"type":"number"}]})"));
  const std::string parts = R"({"properties":{"a":{"const":1}}},{"properties":{"b":{"const":2}}})";
  for (const char* more :
       {R"({"required":["a"]})", R"({"minProperties":3})", R"({"type":"string"})", R"({"not":{}})"})
    EXPECT_EQ(*grammar_of_schema("{\"allOf\":[" + parts + "," + more + "]}"),
              *grammar_of_schema("{\"allOf\":[" + parts + "]}"))
        << more;
  EXPECT_FALSE(allows("{\"allOf\":[" + parts + "]}", R"({"a":1})"));  // both, though none is asked for
  EXPECT_TRUE(allows("{\"allOf\":[" + parts + "]}", R"({"a":1,"b":2})"));
}

TEST(Schema, OddReferencesAreRefused) {
  for (const char* schema :
       {R"({"$ref":"#"})", R"({"$ref":""})", R"({"$ref":"#/"})", R"({"$ref":1})", R"({"$ref":"#/$defs"})",
        R"({"$defs":{"a/b":{}},"$ref":"#/$defs/a~2b"})", R"({"$defs":[1],"$ref":"#/$defs/0"})",
        R"({"$defs":{"a":{}},"$ref":"#/$defs/%6"})", R"({"$defs":{"a":{}},"$ref":"#a"})",
        R"({"$defs":[{}],"$ref":"#/$defs/18446744073709551615"})", R"({"$ref":"http://localhost/x"})"})
    EXPECT_NE(refusal(schema), "") << schema;
  EXPECT_THAT(refusal(R"({"$ref":"#/$defs/none"})"), HasSubstr("none"));
  EXPECT_THAT(refusal(std::string(5000, '[')), HasSubstr("nested"));
}

TEST(Grammar, LeftRecursionIsFoundWhateverIsEmpty) {
  for (const char* circle :
       {"root ::= root", "root ::= (\"\" root)", "root ::= \"a\"* root",
        "root ::= b* root \"x\" | \"y\"\nb ::= \"b\"", "root ::= a\na ::= b \"x\" | \"y\"\nb ::= a",
        // Empty through others: libllama's own search does not see it, and pushes until the memory ends.
        "root ::= e root \"x\" | \"y\"\ne ::= f f\nf ::= ",
        "root ::= (e | \"a\") (root \"x\" | \"y\")\ne ::= f\nf ::= \"q\"?", "root ::= (\"a\" | )* \"x\""})
    EXPECT_THAT(check_grammar(circle).message(), HasSubstr("recursion")) << circle;
  for (const char* good : {"root ::= \"a\" root | \"b\"", "root ::= (\"a\" root)?",
                           "root ::= \"(\" root* \")\"", "root ::= e \"x\" root | \"y\"\ne ::= f f\nf ::= ",
                           // Circles that add nothing to a stack.
                           "root ::= (\"a\"? \"b\"?)* \"x\"", "root ::= (\"a\"?)* \"x\""})
    EXPECT_TRUE(check_grammar(good).ok()) << good << ": " << check_grammar(good).message();
}

// Each character multiplies the ways: the tenth token would take longer than anybody waits.
TEST(Schema, WaysThatMultiplyAreRefused) {
  EXPECT_THAT(refusal(R"({"$defs":{"a":{"anyOf":[)" +
                      repeat(1000, [](int) { return R"({"prefixItems":[{"$ref":"#/$defs/a"}]})"; }) +
                      R"(]}},"$ref":"#/$defs/a"})"),
              HasSubstr("at one place"));
}

TEST(Grammar, WaysAndWalksAreBounded) {
  const auto chain = [](int n, const char* a, const char* b) {
    std::string text = "root ::= a0\n";
    for (int i = 0; i < n; ++i) {
      const std::string next = "a" + std::to_string(i + 1);
      text += "a" + std::to_string(i) + " ::= " + next + a + " | " + next + b + "\n";
    }
    return text + "a" + std::to_string(n) + " ::= \"z\"\n";
  };
  EXPECT_THAT(check_grammar(chain(60, "", "")).message(), HasSubstr("at one place"));
  EXPECT_THAT(check_grammar(chain(60, " \"x\"", " \"y\"")).message(), HasSubstr("at one place"));
  EXPECT_TRUE(check_grammar(chain(8, " \"x\"", " \"y\"")).ok());
  std::string deep = "root ::= r0\n";
  for (int i = 0; i < 6000; ++i) deep += "r" + std::to_string(i) + " ::= r" + std::to_string(i + 1) + "\n";
  EXPECT_THAT(check_grammar(deep + "r6000 ::= \"a\"\n").message(), HasSubstr("too many others"));
  // A name of 30 KB, copied with each of 2000 rules.
  const std::string name(30'000, 'n');
  EXPECT_THAT(check_grammar("root ::= " + name + "\n" + name + " ::= " +
                            repeat(
                                500, [](int) { return "\"a\"{0,2000}"; }, " "))
                  .message(),
              HasSubstr("too many"));
}

}  // namespace
}  // namespace narrows
