// `narrows eval --task needle`: its output; the flags live with `eval`.
#pragma once

#include <string>
#include <vector>

#include "eval/needle.h"

namespace narrows::cli {

/// A row a profile and context, a column a depth, then the total with its 95% interval.
std::string needle_table(const std::vector<NeedleRow>& rows);

/// A list of {"kv","context","depth","correct","trials","low","high","kind"}.
std::string needle_json(const std::vector<NeedleRow>& rows, const std::string& kind);

}  // namespace narrows::cli
