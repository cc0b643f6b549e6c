#include "gguf/key_reader.h"

#include <fmt/format.h>

namespace narrows {

int64_t KeyReader::integer(const std::string& key, std::optional<int64_t> fallback, int64_t low,
                           int64_t high) {
  const Result<std::optional<int64_t>> r = file_.integer(prefix_ + key);
  if (!r.ok()) return fail(r.status(), low);
  if (!r->has_value() && !fallback) return fail(missing(key), low);
  const int64_t v = r->value_or(fallback.value_or(0));
  if (v < low || v > high) {
    return fail(bad(fmt::format("metadata {}{} = {} is not between {} and {}", prefix_, key, v, low, high)),
                low);
  }
  return v;
}

double KeyReader::real(const std::string& key, std::optional<double> fallback, double low, double high) {
  const Result<std::optional<double>> r = file_.real(prefix_ + key);
  if (!r.ok()) return fail(r.status(), low);
  if (!r->has_value() && !fallback) return fail(missing(key), low);
  const double v = r->value_or(fallback.value_or(0));
  if (!(v >= low && v <= high)) {
    return fail(bad(fmt::format("metadata {}{} = {} is not between {} and {}", prefix_, key, v, low, high)),
                low);
  }
  return v;
}

std::string KeyReader::text(const std::string& key, const std::string& fallback) {
  const Result<std::optional<std::string>> r = file_.text(prefix_ + key);
  if (!r.ok()) return fail(r.status(), std::string());
  return r->value_or(fallback);
}

bool KeyReader::flag(const std::string& key, bool fallback) {
  const Result<std::optional<bool>> r = file_.boolean(prefix_ + key);
  if (!r.ok()) return fail(r.status(), fallback);
  return r->value_or(fallback);
}

std::vector<bool> KeyReader::flags(const std::string& key, int64_t n) {
  const std::optional<std::vector<bool>> all = file_.booleans(prefix_ + key);
  if (!all) return {};
  if (static_cast<int64_t>(all->size()) != n)
    return fail(bad(fmt::format("metadata {}{} has {} entries, not one for each of {} layers", prefix_, key,
                                all->size(), n)),
                std::vector<bool>());
  return *all;
}

std::vector<int64_t> KeyReader::integers(const std::string& key) {
  return file_.integers(prefix_ + key).value_or(std::vector<int64_t>());
}

bool KeyReader::has(const std::string& key) const {
  const auto r = file_.integer(prefix_ + key);
  return r.ok() && r->has_value();
}

Status KeyReader::bad(const std::string& what) const {
  return {StatusCode::invalid_file, fmt::format("{}: {}", file_.path(), what)};
}

Status KeyReader::unsupported(const std::string& what) const {
  return {StatusCode::unsupported, fmt::format("{}: {}", file_.path(), what)};
}

Status KeyReader::missing(const std::string& key) const {
  return bad(fmt::format("metadata {}{} is missing", prefix_, key));
}

}  // namespace narrows
