#include "server/json_fields.h"

#include <fmt/format.h>

#include <cmath>

#include "base/utf8.h"

namespace narrows::server {

namespace {

/// Of more an object's fields are looked up in a table.
constexpr size_t kFewFields = 64;
/// Unknown fields that are named.
constexpr size_t kMostUnknown = 16;
constexpr size_t kMostNameBytes = 64;

/// Deepest nesting of arrays and objects; the text need not be JSON.
int depth_of(std::string_view text) {
  int depth = 0;
  int deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

const char* kind_of(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null:
      return "null";
    case Json::value_t::object:
      return "an object";
    case Json::value_t::array:
      return "an array";
    case Json::value_t::string:
      return "a string";
    case Json::value_t::boolean:
      return "a boolean";
    case Json::value_t::number_integer:
    case Json::value_t::number_unsigned:
    case Json::value_t::number_float:
      return "a number";
    default:
      return "something else";
  }
}

std::optional<Json> parse_object(std::string_view text, ApiError& error) {
  if (const size_t bad = find_invalid_utf8(text); bad != std::string_view::npos) {
    error = bad_request(fmt::format("the request is not valid UTF-8 at byte {}", bad));
    return std::nullopt;
  }
  if (depth_of(text) > kMaxJsonDepth) {
    error = bad_request(fmt::format("the request is nested deeper than {} levels", kMaxJsonDepth));
    return std::nullopt;
  }
  std::string why;
  std::optional<Json> json = parse_json(text, why);
  if (!json) {
    error = bad_request("the request " + why);
  } else if (!json->is_object()) {
    error = bad_request(fmt::format("the request is {}, it must be a JSON object", kind_of(*json)));
    json.reset();
  }
  return json;
}

Fields::Fields(const Json& object, std::string path) : object_(object), path_(std::move(path)) {
  if (object_.size() <= kFewFields) return;
  for (const auto& [name, value] : object_.items()) table_.emplace(name, &value);
}

const Json* Fields::find(const char* name) const {
  asked_.insert(name);
  if (!table_.empty()) {
    const auto found = table_.find(name);
    return found == table_.end() || found->second->is_null() ? nullptr : found->second;
  }
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

void Fields::take(const Fields& inner) {
  if (ok() && !inner.ok()) error_ = inner.error_;
  for (std::string& name : inner.unknown()) {
    if (unknown_inside_.size() < kMostUnknown) unknown_inside_.push_back(std::move(name));
  }
}

std::vector<std::string> Fields::unknown() const {
  std::vector<std::string> names;
  for (const auto& [name, value] : object_.items()) {
    if (names.size() >= kMostUnknown) break;
    if (!value.is_null() && !asked_.contains(name)) names.push_back(full(name.substr(0, kMostNameBytes)));
  }
  for (const std::string& name : unknown_inside_) {
    if (names.size() < kMostUnknown) names.push_back(name);
  }
  return names;
}

void Fields::fail(const char* name, const std::string& what) {
  if (ok()) error_ = bad_request(fmt::format("{} {}", full(name), what), full(name));
}

std::optional<bool> Fields::boolean(const char* name) {
  const Json* value = read(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_boolean()) return value->get<bool>();
  fail(name, fmt::format("must be true or false, not {}", kind_of(*value)));
  return std::nullopt;
}

std::optional<double> Fields::number(const char* name, double low, double high) {
  const Json* value = read(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) {
    fail(name, fmt::format("must be a number, not {}", kind_of(*value)));
    return std::nullopt;
  }
  const auto x = value->get<double>();
  if (x >= low && x <= high) return x;  // NaN is out of every range
  fail(name, fmt::format("is {}, it must be from {} to {}", x, low, high));
  return std::nullopt;
}

std::optional<int64_t> Fields::integer(const char* name, int64_t low, int64_t high) {
  const Json* value = read(name);
  if (value == nullptr) return std::nullopt;
  // 3.0 is a whole number too; beyond 2^53 a double no longer says which.
  const bool whole =
      value->is_number_integer() || (value->is_number_float() && std::fabs(value->get<double>()) < 9e15 &&
                                     value->get<double>() == std::floor(value->get<double>()));
  if (!whole) {
    fail(name, fmt::format("must be a whole number, not {}",
                           value->is_number() ? fmt::format("{}", value->get<double>()) : kind_of(*value)));
    return std::nullopt;
  }
  const bool too_large = value->is_number_unsigned() && value->get<uint64_t>() > uint64_t{INT64_MAX};
  const int64_t x = too_large                  ? INT64_MAX
                    : value->is_number_float() ? static_cast<int64_t>(value->get<double>())
                                               : value->get<int64_t>();
  if (!too_large && x >= low && x <= high) return x;
  fail(name, fmt::format("is {}, it must be from {} to {}", value->dump(), low, high));
  return std::nullopt;
}

std::optional<std::string> Fields::text(const char* name, size_t max_bytes) {
  const Json* value = read(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) {
    fail(name, fmt::format("must be a string, not {}", kind_of(*value)));
    return std::nullopt;
  }
  const auto& text = value->get_ref<const std::string&>();
  if (text.size() <= max_bytes) return text;
  fail(name, fmt::format("has {} bytes, at most {} are allowed", text.size(), max_bytes));
  return std::nullopt;
}

std::optional<std::vector<std::string>> Fields::texts(const char* name, size_t max_count, size_t max_bytes) {
  const Json* value = read(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_string()) {
    const std::optional<std::string> one = text(name, max_bytes);
    if (!one) return std::nullopt;
    return std::vector<std::string>{*one};
  }
  if (!value->is_array() || value->size() > max_count) {
    fail(name, fmt::format("must be a string or an array of at most {}", max_count));
    return std::nullopt;
  }
  std::vector<std::string> all;
  for (const Json& item : *value) {
    if (!item.is_string() || item.get_ref<const std::string&>().size() > max_bytes) {
      fail(name, fmt::format("must hold strings of at most {} bytes only", max_bytes));
      return std::nullopt;
    }
    all.push_back(item.get<std::string>());
  }
  return all;
}

const Json* Fields::object(const char* name) {
  const Json* value = read(name);
  if (value == nullptr || value->is_object()) return value;
  fail(name, fmt::format("must be an object, not {}", kind_of(*value)));
  return nullptr;
}

const Json* Fields::array(const char* name) {
  const Json* value = read(name);
  if (value == nullptr || value->is_array()) return value;
  fail(name, fmt::format("must be an array, not {}", kind_of(*value)));
  return nullptr;
}

}  // namespace narrows::server
