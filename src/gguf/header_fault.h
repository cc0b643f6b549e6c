// Why ggml refused a header: its reader only says that it did.
#pragma once

#include <string>

#include "gguf/gguf_file.h"

namespace narrows {

/// What is wrong with the version, before ggml reads the header: older, newer, of the other byte order. Empty
/// if it is one that can be read.
std::string version_fault(uint32_t version);

/// After ggml refused a header of a version that it reads: the first tensor of a type that does not exist
/// here, named. Empty if that is not the reason: then the file is cut off or corrupt.
std::string type_fault(const GgufFile& file);

}  // namespace narrows
