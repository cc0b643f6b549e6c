// JSON schemas, then the grammar that comes of them: refused in one line, or converted, made into a sampler
// and walked for some tokens, in two seconds. Half of the inputs are read as instructions to build a schema,
// so that references and nesting come together in ways that changed bytes of a text rarely do.
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <fstream>
#include <limits>

#include "fuzz/fuzz.h"
#include "narrows/sampling.h"
#include "sample/grammar.h"
#include "temp_dir.h"
#include "text/tiny_vocabulary.h"

namespace narrows::fuzz {

namespace {

constexpr char kBuild = '!';  ///< the first byte of an input that is an instruction

/// What the input may take; sanitizers make it ten times slower.
#if defined(__SANITIZE_ADDRESS__)
constexpr double kMost_s = 20;
#else
constexpr double kMost_s = 2;
#endif

class Builder {
 public:
  explicit Builder(const std::string& bytes) : bytes_(bytes) {}

  std::string schema() {
    const int n_def = 1 + byte() % 8;
    std::string defs;
    for (int i = 0; i < n_def; ++i)
      defs += (i > 0 ? ",\"" : "\"") + std::string(1, static_cast<char>('a' + i)) + "\":" + node(0);
    const std::string root = node(0);
    return R"({"$defs":{)" + defs + "}," + (root.size() > 2 ? root.substr(1) : R"("type":"object"})");
  }

 private:
  int byte() { return at_ < bytes_.size() ? static_cast<unsigned char>(bytes_[at_++]) : 0; }
  std::string name() { return std::string(static_cast<size_t>(1 + byte() % 3), "ab-!\u00e9"[byte() % 4]); }
  std::string number() {
    constexpr const char* kNumbers[] = {"0",   "1",    "2",     "7",      "40",
                                        "400", "2000", "2001",  "100000", "1e9",
                                        "-1",  "-100", "1e300", "9.5",    "999999999999999"};
    return kNumbers[static_cast<size_t>(byte()) % std::size(kNumbers)];
  }
  std::string list(int depth) {
    std::string all = "[";
    for (int n = 1 + byte() % 4; n > 0; --n) all += node(depth) + (n > 1 ? "," : "");
    return all + "]";
  }

  std::string node(int depth) {
    const int kind = depth > 20 || at_ >= bytes_.size() ? 0 : byte() % 16;
    switch (kind) {
      case 1:
      case 2:
        return std::string("{\"$ref\":\"#/$defs/") + static_cast<char>('a' + byte() % 8) + "\"}";
      case 3: {
        constexpr const char* kReferences[] = {"#",
                                               "#/$defs/%61",
                                               "#/%24defs/b",
                                               "#/$defs/a/items",
                                               "#/anyOf/1",
                                               "#/$defs/~0",
                                               "#/$defs/%7E1",
                                               "#/$defs%2Fc",
                                               "#/anyOf/01",
                                               "#/prefixItems/0",
                                               "#/$defs/a/properties/a~01",
                                               "#/properties"};
        return std::string("{\"$ref\":\"") +
               kReferences[static_cast<size_t>(byte()) % std::size(kReferences)] + "\"}";
      }
      case 4:
        return "{\"anyOf\":" + list(depth + 1) + "}";
      case 5:
        return "{\"allOf\":" + list(depth + 1) + "}";
      case 6:
        return "{\"oneOf\":" + list(depth + 1) + "}";
      case 7:
        return "{\"type\":[\"object\",\"null\",\"array\",\"string\"],\"properties\":{\"" + name() +
               "\":" + node(depth + 1) + "},\"items\":" + node(depth + 1) + "}";
      case 8:
        return "{\"items\":" + node(depth + 1) + ",\"minItems\":" + number() + ",\"maxItems\":" + number() +
               "}";
      case 9:
        return "{\"prefixItems\":" + list(depth + 1) + (byte() % 2 == 0 ? ",\"items\":false" : "") +
               (byte() % 4 == 0 ? ",\"maxItems\":" + number() : "") + "}";
      case 10: {
        std::string all;
        for (int n = byte() % 12; n >= 0; --n)
          all += "\"" + name() + "\":" + node(depth + 1) + (n > 0 ? "," : "");
        return "{\"type\":\"object\",\"properties\":{" + all + "},\"required\":[\"" + name() + "\"]" +
               (byte() % 2 == 0 ? ",\"additionalProperties\":" + node(depth + 1) : "") + "}";
      }
      case 11:
        return R"({"type":"string","minLength":)" + number() + ",\"maxLength\":" + number() + "}";
      case 12:
        return R"({"type":"integer","minimum":)" + number() +
               (byte() % 2 == 0 ? ",\"maximum\":" : ",\"exclusiveMinimum\":") + number() +
               (byte() % 2 == 0 ? ",\"exclusiveMaximum\":" + number() : "") + "}";
      case 13: {
        constexpr const char* kParts[] = {"a",     "(",      ")",      "(b|c)", "*",       "+",  "?",
                                          "{2,5}", "{0,40}", "[^a-z]", "[]",    ".",       "|",  "(a?b?)*",
                                          "()",    "\\\\n",  "\\\\d",  "]",     "\\u0000", "{,}"};
        std::string pattern = "^";
        for (int n = byte() % 12; n > 0; --n)
          pattern += kParts[static_cast<size_t>(byte()) % std::size(kParts)];
        return R"({"type":"string","pattern":")" + pattern + "$\"}";
      }
      case 14:
        return R"({"enum":["a",1,null,{"b":[]}]})";
      case 15:
        return R"({"type":"object"})";
      default:
        return depth % 2 == 0 ? R"({"type":"null"})" : "{}";
    }
  }

  const std::string& bytes_;
  size_t at_ = 1;
};

const Tokenizer& tokenizer() {
  static const std::unique_ptr<Tokenizer> loaded = [] {
    const testing::TempDir dir;
    check(testing::TinyVocabulary().write(dir.path("v.gguf")), "the vocabulary cannot be written");
    return std::move(Tokenizer::load(dir.path("v.gguf")).value());
  }();
  return *loaded;
}

void walk(const std::string& grammar, size_t seed) {
  SamplerOptions options;
  options.temperature = 0;
  options.grammar = grammar;
  Result<std::unique_ptr<Sampler>> sampler = Sampler::create(options, &tokenizer());
  if (!sampler.ok()) return check_sentence(sampler.status());
  std::vector<float> logits(static_cast<size_t>(tokenizer().n_vocab()));
  for (int step = 0; step < 12; ++step) {
    for (float& x : logits) {
      seed = seed * 6364136223846793005U + 1442695040888963407U;
      x = static_cast<float>(seed >> 40);
    }
    const Result<Token> token = (*sampler)->sample(logits);
    if (!token.ok()) return check_sentence(token.status());
    if (tokenizer().is_end(*token)) return;
    (*sampler)->accept(*token);
  }
}

}  // namespace

std::vector<Seed> seeds() {
  (void)tokenizer();  // before memory is counted
  std::vector<Seed> all;
  for (
      const char* text : {
          R"({"$defs":{"a":{"$ref":"#/$defs/a"}},"allOf":[{"$ref":"#/$defs/a"}]})",
          R"({"$defs":{"n":{"anyOf":[{"type":"null"},{"type":"object","properties":{"l":{"$ref":"#/$defs/n"},"r":{"$ref":"#/$defs/n"}}}]}},"$ref":"#/$defs/n"})",
          R"({"type":"object","properties":{"name":{"type":"string","pattern":"^[A-Z][a-z]{1,20}( [A-Z]+)?$"},"age":{"type":"integer","minimum":0,"maximum":150},"tags":{"type":"array","items":{"enum":["x","y"]},"minItems":1,"maxItems":5}},"required":["name"],"additionalProperties":{"type":"number"}})",
          R"({"allOf":[{"properties":{"a":{"type":"string","format":"date-time"}}},{"anyOf":[{"properties":{"b":{"const":[1,2]}}},{"$ref":"#/definitions/c"}]}],"definitions":{"c":{"properties":{"d":{"type":["string","null"],"maxLength":9}}}}})",
          R"({"prefixItems":[{"type":"integer","exclusiveMinimum":-5},{"oneOf":[{"$ref":"#/prefixItems/0"},{"type":"boolean"}]}]})",
      })
    all.push_back({text, std::string_view(text).size()});
  for (unsigned i = 1; i <= 12; ++i) {
    std::string bytes(1, kBuild);
    for (unsigned n = 0; n < 20 * i; ++n) bytes += static_cast<char>((n * i * 2654435761U) >> 13);
    all.push_back({bytes, bytes.size()});
  }
  return all;
}

}  // namespace narrows::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace narrows;
  const std::string bytes(reinterpret_cast<const char*>(data), std::min<size_t>(size, 1 << 16));
  const std::string schema =
      !bytes.empty() && bytes[0] == fuzz::kBuild ? fuzz::Builder(bytes).schema() : bytes;
  const auto begin = std::chrono::steady_clock::now();
  const Result<std::string> grammar = grammar_of_schema(schema);
  if (grammar.ok()) {
    ++fuzz::g_accepted;
    fuzz::walk(*grammar, size);
  } else {
    fuzz::check_sentence(grammar.status());
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  fuzz::check(seconds < fuzz::kMost_s, fmt::format("{:.1f} s for {}", seconds, schema));
  return 0;
}
