// Reads descriptor 0 in blocks and cuts lines out of them.
#include "cli/line_reader.h"

#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "base/file.h"

namespace narrows::cli {
namespace {

constexpr size_t kBlock = 65536;
constexpr size_t kMaxLine = size_t{256} << 20;  ///< as for a file: far above any context

}  // namespace

LineReader::Event LineReader::next(std::string& text) {
  while (true) {
    size_t end = buffer_.find('\n', scanned_);
    if (end != std::string::npos || (at_end_ && !buffer_.empty())) {
      text = buffer_.substr(0, end);
      buffer_.erase(0, end == std::string::npos ? end : end + 1);
      scanned_ = 0;
      if (!text.empty() && text.back() == '\r') text.pop_back();
      if (at_begin_) drop_byte_order_mark(text);
      at_begin_ = false;
      return Event::line;
    }
    if (at_end_) return Event::end;
    scanned_ = buffer_.size();
    if (scanned_ > kMaxLine) {
      text = "a line has more than 256 MiB";
      return Event::failure;
    }
    buffer_.resize(scanned_ + kBlock);
    const ssize_t got = ::read(STDIN_FILENO, buffer_.data() + scanned_, kBlock);
    const int error = errno;
    buffer_.resize(scanned_ + (got > 0 ? static_cast<size_t>(got) : 0));
    if (got == 0) at_end_ = true;
    if (got < 0 && error == EINTR) return Event::interrupt;
    if (got < 0) {
      text = std::generic_category().message(error);
      return Event::failure;
    }
  }
}

}  // namespace narrows::cli
