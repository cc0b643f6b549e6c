#include "gguf/split_name.h"

#include <fmt/format.h>

namespace narrows {

namespace {

std::string ending(int64_t number, int64_t count) {
  return fmt::format("-{:05}-of-{:05}.gguf", number + 1, count);
}

}  // namespace

std::optional<std::string> part_beside(const std::string& path, int64_t own, int64_t number, int64_t count) {
  const std::string own_ending = ending(own, count);
  if (!path.ends_with(own_ending)) return std::nullopt;
  return path.substr(0, path.size() - own_ending.size()) + ending(number, count);
}

}  // namespace narrows
