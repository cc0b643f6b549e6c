// Lines from standard input. Unlike std::getline it returns when Ctrl-C is pressed while waiting.
#pragma once

#include <string>

namespace narrows::cli {

class LineReader {
 public:
  enum class Event { line, end, interrupt, failure };

  /// line: `text` is the next line without its line break. failure: `text` says why.
  Event next(std::string& text);

 private:
  std::string buffer_;
  size_t scanned_ = 0;    ///< no line break before this offset
  bool at_begin_ = true;  ///< a byte order mark may come
  bool at_end_ = false;
};

}  // namespace narrows::cli
