// UTF-8, strictly: no overlong forms, no surrogates, nothing above U+10FFFF.
// One classifier serves both users: the check of prompts and the streaming of half-finished sequences.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace narrows {

enum class Utf8Kind {
  valid,       ///< a whole sequence
  incomplete,  ///< all bytes given fit, and more could complete them
  invalid,     ///< bytes that no continuation can repair
};

struct Utf8Sequence {
  Utf8Kind kind;
  /// valid: 1 to 4. incomplete: all bytes given. invalid: the longest part that could have begun a sequence
  /// (at least 1), which Unicode asks to replace by one U+FFFD.
  size_t length;
};

/// What the bytes begin with; they must not be empty.
Utf8Sequence first_utf8_sequence(std::string_view bytes);

/// Offset of the first sequence that is invalid or cut off by the end; npos if there is none.
size_t find_invalid_utf8(std::string_view text);

/// U+FFFD, for bytes that are not text.
inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

/// The text between single quotes, fit for a one-line message: control characters and bytes that are not
/// UTF-8 as \xNN, and cut to its first max_bytes bytes.
std::string quote(std::string_view text, size_t max_bytes = 120);

}  // namespace narrows
