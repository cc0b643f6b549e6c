// Names of the parts of a model in several files: PREFIX-00002-of-00005.gguf, as llama-gguf-split writes
// them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace narrows {

/// The path of part `number` (from 0) beside the part of that path; nullopt if that is not named as part
/// `own` of `count`.
std::optional<std::string> part_beside(const std::string& path, int64_t own, int64_t number, int64_t count);

}  // namespace narrows
