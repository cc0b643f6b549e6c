// The only places that write to the terminal: results to stdout, everything said beside them to stderr.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "narrows/status.h"

namespace narrows::cli {

/// Unbuffered, so that text appears as it is made and a failure is seen at once. io_error: closed pipe, full
/// disk.
Status write_stdout(std::string_view text);

/// A line on stderr. Failures are ignored: there is nowhere left to report them.
void note(std::string_view line);

/// `narrows: <sentence>` on stderr, always one line.
void print_error(const Status& status);

/// Before anything else: a standard stream that the program was started without would else be the next file
/// that it opens, the model say. Input is then empty, output an error of each write, and notes go nowhere.
void open_missing_streams();

bool stdin_is_terminal();
bool stderr_is_terminal();

/// "12.3 MB": decimal units, three digits.
std::string human_bytes(int64_t bytes);

}  // namespace narrows::cli
