// The regular expressions of JSON schemas (ECMA-262's) as llama.cpp's converter follows them.
#pragma once

#include <string>

#include "narrows/status.h"

namespace narrows {

/// A pattern that the converter knows, whose strings are those that contain a match of this one, as a JSON
/// text writes them: anchored, classes as ranges of characters, quotes, backslashes and control characters as
/// JSON's escapes. What it takes out: other spellings of one string (\u escapes), control characters that
/// have no short escape, unless they are named one by one. invalid_argument with a sentence: no regular
/// expression; one with a part that is not followed (assertions but ^ and $ at the ends, back references, \p
/// classes, flags); one that is too long or too deep.
Result<std::string> plain_pattern(const std::string& pattern);

}  // namespace narrows
