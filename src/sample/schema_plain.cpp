// What JSON Schema lets a document say in more ways than llama.cpp's converter understands, said in its way.
#include <fmt/format.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/utf8.h"
#include "sample/schema_check.h"
#include "sample/schema_pattern.h"

namespace narrows {

namespace {

/// Values of all schemas that references lead to, each as often as it stands in one of them.
constexpr int64_t kMaxCopied = 100'000;
/// Of all patterns as the converter gets them.
constexpr size_t kMaxPatternBytes = 2'000'000;

/// "%2F" becomes "/"; nothing where it is no such text.
std::optional<std::string> percent_decoded(std::string_view text) {
  const auto digit = [](char c) {
    const size_t at =
        std::string_view("0123456789abcdef").find(c >= 'A' && c <= 'F' ? static_cast<char>(c + 32) : c);
    return at == std::string_view::npos ? -1 : static_cast<int>(at);
  };
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    if (i + 2 >= text.size()) return std::nullopt;
    const int high = digit(text[i + 1]), low = digit(text[i + 2]);
    if (high < 0 || low < 0) return std::nullopt;
    out += static_cast<char>(high * 16 + low);
    i += 2;
  }
  return out;
}

/// "~1" becomes "/", "~0" "~".
std::optional<std::string> tilde_decoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '~') {
      out += text[i];
    } else if (++i < text.size() && (text[i] == '0' || text[i] == '1')) {
      out += text[i] == '0' ? '~' : '/';
    } else {
      return std::nullopt;
    }
  }
  return out;
}

/// An index as JSON pointers write it: digits, no 0 before others.
std::optional<size_t> index_of(const std::string& text) {
  const bool digits = text.find_first_not_of("0123456789") == std::string::npos;
  if (text.empty() || text.size() > 9 || !digits || (text[0] == '0' && text.size() > 1)) return std::nullopt;
  return std::stoul(text);
}

/// `pointer`: "" or "/a/b". Null if it leads nowhere.
const common_json* follow(const common_json& root, std::string_view pointer, bool tildes) {
  const common_json* at = &root;
  while (!pointer.empty()) {
    pointer.remove_prefix(1);
    const size_t end = std::min(pointer.find('/'), pointer.size());
    const std::string_view raw = pointer.substr(0, end);
    pointer.remove_prefix(end);
    const std::optional<std::string> name = tildes ? tilde_decoded(raw) : std::string(raw);
    if (!name) return nullptr;
    if (at->is_object() && at->contains(*name)) {
      at = &at->at(*name);
    } else if (const std::optional<size_t> index = index_of(*name);
               at->is_array() && index && *index < at->size()) {
      at = &at->at(*index);
    } else {
      return nullptr;
    }
  }
  return at;
}

/// As RFC 6901 has it; where that leads nowhere, as the text stands, which some generators mean.
const common_json* target_of(const common_json& root, const std::string& reference) {
  if (reference.empty() || reference[0] != '#') return nullptr;
  const std::string_view raw = std::string_view(reference).substr(1);
  if (!raw.empty() && raw[0] != '/') return nullptr;
  const std::optional<std::string> decoded = percent_decoded(raw);
  const common_json* found = nullptr;
  if (decoded && (decoded->empty() || (*decoded)[0] == '/')) found = follow(root, *decoded, true);
  if (found == nullptr) found = follow(root, raw, true);
  return found != nullptr ? found : follow(root, raw, false);
}

Status refusal(const std::string& what) { return {StatusCode::invalid_argument, what}; }

/// Whether values of this type may be meant.
bool may_be(const common_json& schema, const char* name) {
  if (!schema.contains("type")) return true;
  const common_json& type = schema.at("type");
  if (!type.is_array()) return type == name;
  for (const auto& one : type) {
    if (one == name) return true;
  }
  return false;
}

}  // namespace

std::string SchemaReferences::original(const std::string& reference) const {
  if (reference.compare(0, prefix.size(), prefix) != 0) return reference;
  const std::optional<size_t> index = index_of(reference.substr(prefix.size()));
  return index && *index < names.size() ? names[*index] : reference;
}

std::string SchemaReferences::with_originals(std::string text) const {
  for (size_t at = text.find(prefix); at != std::string::npos && !prefix.empty();
       at = text.find(prefix, at)) {
    const size_t digits = at + prefix.size();
    const size_t end = std::min(text.find_first_not_of("0123456789", digits), text.size());
    const std::string name = original(text.substr(at, end - at));
    text.replace(at, end - at, name);
    at += name.size();
  }
  return text;
}

namespace {

class Plain {
 public:
  Plain(const common_json& root, SchemaReferences& references) : root_(root), references_(references) {}

  Status all(common_json& schema) {
    if (schema.is_boolean()) schema = schema == true ? common_json::object() : schema;
    if (!schema.is_object()) return {};
    std::string key = "narrows-references";
    while (schema.contains(key)) key += '-';
    references_.prefix = "#/" + key + "/";
    if (Status s = node(schema); !s.ok()) return s;
    common_json list = common_json::array();
    for (size_t i = 0; i < targets_.size(); ++i) {  // grows while it is walked
      if (!charge(*targets_[i])) return refusal("the schema is too large once its references are followed");
      common_json copy = *targets_[i];
      if (Status s = node(copy); !s.ok()) return s;
      list.push_back(common_json_value(std::move(copy)));
    }
    if (!targets_.empty()) schema[key] = std::move(list);
    return {};
  }

 private:
  Status node(common_json& schema) {
    if (schema.is_boolean() && schema == true) schema = common_json::object();
    if (!schema.is_object()) return {};
    if (schema.contains("$ref")) {
      reference(schema.at("$ref"));
      return {};
    }
    bounds(schema, "minimum", "exclusiveMinimum", 1);
    bounds(schema, "maximum", "exclusiveMaximum", -1);
    if (schema.contains("pattern") && schema.at("pattern").is_string() && may_be(schema, "string")) {
      if (Status s = pattern(schema.at("pattern")); !s.ok()) return s;
    }
    if (may_be(schema, "array")) {
      if (Status s = array(schema); !s.ok()) return s;
    }
    for (const char* key : {"oneOf", "anyOf", "allOf", "prefixItems", "items"}) {
      if (!schema.contains(key)) continue;
      common_json& value = schema.at(key);
      if (!value.is_array()) {
        if (Status s = node(value); !s.ok()) return s;
        continue;
      }
      for (auto& one : value) {
        if (Status s = node(one); !s.ok()) return s;
      }
    }
    if (schema.contains("properties") && schema.at("properties").is_object()) {
      for (const auto& [name, property] : schema.at("properties").items()) {
        if (Status s = node(property); !s.ok()) return s;
      }
    }
    return schema.contains("additionalProperties") ? node(schema.at("additionalProperties")) : Status();
  }

  /// Each text once, however many copies of its schema there are.
  Status pattern(common_json& value) {
    const auto text = value.get<std::string>();
    if (text.empty()) return {};
    const auto [found, is_new] = patterns_.try_emplace(text);
    if (is_new) {
      Result<std::string> plain = plain_pattern(text);
      if (!plain.ok()) return plain.status();
      found->second = std::move(*plain);
    }
    pattern_bytes_ += found->second.size();
    if (pattern_bytes_ > kMaxPatternBytes) return refusal("the patterns of the schema are too long together");
    value = found->second;
    return {};
  }

  /// Each target once, by a name that needs no decoding and cannot be mixed up with another. One that leads
  /// nowhere is left for the converter to refuse.
  void reference(common_json& value) {
    if (!value.is_string()) return;
    const auto text = value.get<std::string>();
    const common_json* const target = target_of(root_, text);
    if (target == nullptr) return;
    const auto [found, is_new] = numbers_.try_emplace(target, targets_.size());
    if (is_new) {
      targets_.push_back(target);
      references_.names.push_back(text);
    }
    value = fmt::format("{}{}", references_.prefix, found->second);
  }

  /// The converter reads one bound of a side; `sign`: 1 where the larger one is the stricter.
  static void bounds(common_json& schema, const char* plain, const char* exclusive, int sign) {
    if (!schema.contains(exclusive)) return;
    if (schema.at(exclusive).is_boolean()) {  // of draft 4: whether the other bound is one
      const bool is_one = schema.at(exclusive) == true && schema.contains(plain);
      if (is_one) schema[exclusive] = common_json(schema.at(plain));
      schema.erase(is_one ? plain : exclusive);
      return;
    }
    if (!schema.contains(plain) || !schema.at(plain).is_number() || !schema.at(exclusive).is_number()) return;
    const double difference = schema.at(exclusive).get<double>() - schema.at(plain).get<double>();
    schema.erase(sign * difference >= 0 ? plain : exclusive);
  }

  /// The converter takes items before prefixItems, and a list of either for exactly those.
  static Status array(common_json& schema) {
    const bool has_prefix = schema.contains("prefixItems") && schema.at("prefixItems").is_array();
    if (schema.contains("items")) {
      const common_json& items = schema.at("items");
      if (has_prefix || items == true) {
        schema.erase("items");
      } else if (items == false) {
        schema["items"] = common_json::object();
        schema["maxItems"] = 0;
      }
    }
    const char* const list = has_prefix ? "prefixItems" : "items";
    if (!schema.contains(list) || !schema.at(list).is_array()) return {};
    const auto n = static_cast<double>(schema.at(list).size());
    const auto number = [&](const char* key, double otherwise) {
      return schema.contains(key) && schema.at(key).is_number() ? schema.at(key).get<double>() : otherwise;
    };
    if (number("minItems", 0) > n)
      return refusal(fmt::format("minItems is {}, but {} has {}, and an array ends with them",
                                 schema.at("minItems").dump(), list, n));
    while (number("maxItems", n) < static_cast<double>(schema.at(list).size()) && !schema.at(list).empty())
      schema.at(list).erase(schema.at(list).size() - 1);
    return {};
  }

  bool charge(const common_json& value) {
    if (++n_copied_ > kMaxCopied) return false;
    if (!value.is_object() && !value.is_array()) return true;
    for (const auto& [key, item] : value.items()) {
      if (!charge(item)) return false;
    }
    return true;
  }

  const common_json& root_;
  SchemaReferences& references_;
  std::vector<const common_json*> targets_;
  std::unordered_map<const common_json*, size_t> numbers_;
  int64_t n_copied_ = 0;
  std::unordered_map<std::string, std::string> patterns_;
  size_t pattern_bytes_ = 0;
};

}  // namespace

Status plain_schema(common_json& schema, SchemaReferences& references) {
  const common_json root = schema;
  return Plain(root, references).all(schema);
}

}  // namespace narrows
