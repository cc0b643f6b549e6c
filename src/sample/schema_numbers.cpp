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

}  // namespace

Status check_numbers(const common_json& schema, const common_json* type) {
  for (const char* key : {"minLength", "maxLength", "minItems", "maxItems"}) {
    if (!schema.contains(key)) continue;
    const common_json& value = schema.at(key);
    if (value.is_number() && (value.get<double>() < 0 || value.get<double>() > 1e9))
      return refusal(fmt::format("{} is {}, it must be from 0 to 1000000000", key, value.dump()));
  }
  if (type == nullptr || *type != "integer") return {};
  const auto number = [&](const char* key, double otherwise) {
    return schema.contains(key) && schema.at(key).is_number() ? schema.at(key).get<double>() : otherwise;
  };
  const double low = std::max(number("minimum", -INFINITY), number("exclusiveMinimum", -INFINITY));
  const double high = std::min(number("maximum", INFINITY), number("exclusiveMaximum", INFINITY));
  if (low > high) return refusal(fmt::format("no integer is from {} to {}", low, high));
  for (const char* key : {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}) {
    if (!schema.contains(key)) continue;
    const common_json& value = schema.at(key);
    const long long end = key[1] == 'i' ? INT64_MIN : INT64_MAX;
    if (key[0] == 'm' && value.is_number_integer() && value.get<long long>() == end) continue;
    if (value.is_number() && !(std::fabs(value.get<double>()) <= kMaxBound))
      return refusal(fmt::format("{} is {}, it must fit 64 bits", key, quote(value.dump(), 60)));
  }
  return {};
}

}  // namespace narrows
