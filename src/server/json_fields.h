// Reading a JSON request: every field is checked for its type and range, and the refusal names it.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "server/api_error.h"
#include "server/json_tree.h"

namespace narrows::server {

/// Deepest nesting of a request. nlohmann's writer and llama.cpp's schema converter recurse.
inline constexpr int kMaxJsonDepth = 64;

/// A JSON object of at most kMaxJsonDepth levels. Nothing: error says why.
std::optional<Json> parse_object(std::string_view text, ApiError& error);

/// Fields of an object. The first that is wrong is remembered; all later reads give nothing. A field that is
/// null counts as absent, as OpenAI's clients send them. What is never asked for is unknown.
class Fields {
 public:
  /// Of an object inside: "path" goes before the names in messages.
  explicit Fields(const Json& object, std::string path = {});

  bool ok() const { return !error_; }
  const std::optional<ApiError>& error() const { return error_; }

  /// The field, or null if it is absent (or null).
  const Json* find(const char* name) const;
  bool has(const char* name) const { return find(name) != nullptr; }

  std::optional<bool> boolean(const char* name);
  std::optional<int64_t> integer(const char* name, int64_t low, int64_t high);
  std::optional<double> number(const char* name, double low, double high);
  std::optional<std::string> text(const char* name, size_t max_bytes);
  /// A text, or a list of at most max_count of them.
  std::optional<std::vector<std::string>> texts(const char* name, size_t max_count, size_t max_bytes);
  const Json* object(const char* name);
  const Json* array(const char* name);

  void fail(const char* name, const std::string& what);
  /// Takes over what an object inside has: its error, its unknown fields. When all of it has been read.
  void take(const Fields& inner);
  /// A field that changes nothing here.
  void pass(const char* name) { asked_.insert(name); }
  /// Fields that nobody has asked for, the first few of them, with their paths.
  std::vector<std::string> unknown() const;

 private:
  const Json* read(const char* name) { return ok() ? find(name) : nullptr; }
  std::string full(const std::string& name) const { return path_.empty() ? name : path_ + "." + name; }

  const Json& object_;
  std::string path_;
  std::unordered_map<std::string_view, const Json*> table_;  ///< if they are many
  std::optional<ApiError> error_;
  mutable std::set<std::string> asked_;
  std::vector<std::string> unknown_inside_;
};

/// What a value is, for messages: "a number", "an array", ...
const char* kind_of(const Json& value);

}  // namespace narrows::server
