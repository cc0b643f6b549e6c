// Whole files in and out. Reading tells a missing file from a folder and from one that may not be read;
// writing leaves either the complete new file or the old one, never a part.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>

#include "narrows/status.h"

namespace narrows {

/// ok if the path is something to read (a regular file, pipe or device). invalid_file: missing, a folder, or
/// not readable for this user, each in its own sentence. An empty file is ok here.
Status check_readable(const std::string& path, bool regular = false);

/// The whole content. invalid_file as check_readable(), or if there are more than max_bytes; io_error if
/// reading fails on the way; out_of_memory. Pipes and devices such as /dev/stdin may be read too.
/// regular: devices and pipes, which may wait or have no end, are invalid_file; so for check_readable().
Result<std::string> read_file(const std::string& path, int64_t max_bytes, bool regular = false);

/// Without the mark (U+FEFF) that some editors put before a text in UTF-8: it belongs to the file, not to the
/// text, and would become a token.
void drop_byte_order_mark(std::string& text);

/// ok if write_file_atomically() could begin now: for asking before long work. Leaves nothing behind.
Status check_writable(const std::string& path);

/// Writes the content to the stream. Errors of the stream itself need no check: they are found afterwards.
using FileWriter = std::function<Status(std::FILE* file)>;

/// Calls the writer on a temporary file beside `path`, brings it to the disk and renames it to `path`.
/// On any failure the temporary file is removed and `path` is as it was. invalid_argument: the folder does
/// not exist or may not be written, or `path` is something other than a regular file; disk_full; io_error:
/// the disk failed.
Status write_file_atomically(const std::string& path, const FileWriter& writer);

}  // namespace narrows
