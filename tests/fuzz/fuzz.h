// What a fuzz target shares with its driver: seeds, a file in memory, checks that end the program. A finding
// is an abort.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "narrows/status.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace narrows::fuzz {

/// A good input to begin with.
struct Seed {
  std::string bytes;
  size_t header = 0;  ///< bytes at the front that say how to read the rest: most mutations go there
};

/// Each target has its own.
std::vector<Seed> seeds();

/// Inputs that the reader took; counted by the target. All refused or all taken would be a poor fuzzer.
inline uint64_t g_accepted = 0;

/// Bytes that an input may take beside what its own size allows; for targets that make more of it. Set by
/// seeds().
inline int64_t g_more_bytes = 0;

[[noreturn]] inline void finding(const std::string& what) {
  (void)std::fprintf(stderr, "finding: %s\n", what.c_str());
  std::abort();
}

inline void check(bool holds, const std::string& what) {
  if (!holds) finding(what);
}

/// A refusal is one line of text without a full stop, whatever the file says, and no bug of ours.
inline void check_sentence(const Status& s) {
  check(s.code() != StatusCode::internal, "called internal: " + s.message());
  check(!s.message().empty() && s.message().back() != '.', "not a sentence: " + s.message());
  check(s.message().size() < 2000, "a refusal of " + std::to_string(s.message().size()) + " bytes");
  for (const char c : s.message())
    check(static_cast<unsigned char>(c) >= 0x20, "more than a line: " + s.message());
}

/// Bytes as a regular file that exists in memory alone.
class MemoryFile {
 public:
  MemoryFile(const uint8_t* data, size_t size) : fd_(::memfd_create("fuzz", MFD_CLOEXEC)) {
    for (size_t at = 0; at < size;) {
      const ssize_t n = ::write(fd_, data + at, size - at);
      check(n > 0, "the input cannot be written to memory");
      at += static_cast<size_t>(n);
    }
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

}  // namespace narrows::fuzz
