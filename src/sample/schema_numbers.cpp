#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "base/utf8.h"
#include "sample/schema_check.h"

namespace narrows {

namespace {

/// Of integers, but for the ends of 64 bits, which mean no bound.
constexpr double kMaxBound = 9e18;

Status refusal(const std::string& what) { return {StatusCode::invalid_argument, what}; }

bool has_number(const common_json& schema, const char* key) {
  return schema.contains(key) && schema.at(key).is_number();
}

double number(const common_json& schema, const char* key, double otherwise) {
  return has_number(schema, key) ? schema.at(key).get<double>() : otherwise;
}

/// "5" or "above 5".
std::string bound(const common_json& schema, const char* plain, const char* exclusive, const char* word) {
  return has_number(schema, exclusive) ? fmt::format("{} {}", word, schema.at(exclusive).dump())
                                       : schema.at(plain).dump();
}

Status nothing(const common_json& schema, const char* what) {
  return refusal(fmt::format("no {} is from {} to {}", what,
                             bound(schema, "minimum", "exclusiveMinimum", "above"),
                             bound(schema, "maximum", "exclusiveMaximum", "below")));
}

/// Of numbers; a side has one bound (plain_schema()).
Status check_range(const common_json& schema) {
  const double low = number(schema, "exclusiveMinimum", number(schema, "minimum", -INFINITY));
  const double high = number(schema, "exclusiveMaximum", number(schema, "maximum", INFINITY));
  const bool exclusive = has_number(schema, "exclusiveMinimum") || has_number(schema, "exclusiveMaximum");
  return low > high || (low == high && exclusive) ? nothing(schema, "number") : Status();
}

/// A bound of integers that fits; fractions are rounded inwards.
long long rounded(const common_json& value, bool up) {
  if (value.is_number_integer()) return value.get<long long>();
  const double d = value.get<double>();
  return static_cast<long long>(up ? std::ceil(d) : std::floor(d));
}

Status check_integer_range(const common_json& schema) {
  long long low = INT64_MIN, high = INT64_MAX;
  if (has_number(schema, "minimum")) low = rounded(schema.at("minimum"), true);
  if (has_number(schema, "exclusiveMinimum")) low = rounded(schema.at("exclusiveMinimum"), false) + 1;
  if (has_number(schema, "maximum")) high = rounded(schema.at("maximum"), false);
  if (has_number(schema, "exclusiveMaximum")) high = rounded(schema.at("exclusiveMaximum"), true) - 1;
  return low > high ? nothing(schema, "integer") : Status();
}

}  // namespace

Status check_numbers(const common_json& schema, const common_json* type) {
  for (const char* key : {"minLength", "maxLength", "minItems", "maxItems"}) {
    if (!schema.contains(key)) continue;
    const common_json& value = schema.at(key);
    if (value.is_number() && (value.get<double>() < 0 || value.get<double>() > 1e9))
      return refusal(fmt::format("{} is {}, it must be from 0 to 1000000000", key, value.dump()));
  }
  for (const auto& [low, high] : {std::pair{"minLength", "maxLength"}, std::pair{"minItems", "maxItems"}}) {
    if (number(schema, low, 0) > number(schema, high, INFINITY))
      return refusal(fmt::format("{} is {} and {} is {}: nothing is left", low, schema.at(low).dump(), high,
                                 schema.at(high).dump()));
  }
  if (type == nullptr) return {};
  if (*type == "number") return check_range(schema);
  if (*type != "integer") return {};
  for (const char* key : {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}) {
    if (!schema.contains(key)) continue;
    const common_json& value = schema.at(key);
    const long long end = key[1] == 'i' ? INT64_MIN : INT64_MAX;
    if (key[0] == 'm' && value.is_number_integer() && value.get<long long>() == end) continue;
    if (value.is_number() && !(std::fabs(value.get<double>()) <= kMaxBound))
      return refusal(fmt::format("{} is {}, it must fit 64 bits", key, quote(value.dump(), 60)));
  }
  return check_integer_range(schema);
}

}  // namespace narrows
