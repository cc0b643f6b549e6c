// Reads /proc/meminfo, /proc/self/status and the cgroup v2 files of Linux.
#include "base/memory.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace narrows {

namespace {

/// The number after `name` in a file of "name number ..." lines, 0 if there is none.
int64_t read_plain_line(const char* path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  while (file >> word) {
    if (word == name) {
      int64_t v = 0;
      return (file >> v) ? v : 0;
    }
    file.ignore(1 << 16, '\n');
  }
  return 0;
}

/// The same for a line in kB, as bytes.
int64_t read_kb_line(const char* path, const std::string& name) { return read_plain_line(path, name) * 1024; }

int64_t read_number(const char* path) {
  std::ifstream file(path);
  int64_t v = 0;
  return (file >> v) ? v : -1;  // "max" and a missing file alike: no limit
}

}  // namespace

int64_t available_memory_bytes() {
  int64_t bytes = read_kb_line("/proc/meminfo", "MemAvailable:");
  const int64_t limit = read_number("/sys/fs/cgroup/memory.max");
  // memory.current counts cached file pages, which the kernel gives back: "anon" is what cannot go.
  const int64_t used = read_plain_line("/sys/fs/cgroup/memory.stat", "anon");
  if (limit > 0) {
    const int64_t left = std::max<int64_t>(1, limit - used);
    bytes = bytes > 0 ? std::min(bytes, left) : left;
  }
  return bytes;
}

int64_t resident_bytes() { return read_kb_line("/proc/self/status", "VmRSS:"); }
int64_t peak_resident_bytes() { return read_kb_line("/proc/self/status", "VmHWM:"); }
void forget_peak_resident_bytes() { std::ofstream("/proc/self/clear_refs") << 5; }

}  // namespace narrows
