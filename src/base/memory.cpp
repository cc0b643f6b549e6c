// Reads /proc/meminfo and /proc/self/status of Linux.
#include "base/memory.h"

#include <algorithm>
#include <fstream>
#include <string>

#include "base/cgroup.h"

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

}  // namespace

int64_t available_memory_bytes() {
  int64_t bytes = read_kb_line("/proc/meminfo", "MemAvailable:");
  if (const auto left = cgroup_limits().memory_left) bytes = bytes > 0 ? std::min(bytes, *left) : *left;
  return bytes;
}

int64_t resident_bytes() { return read_kb_line("/proc/self/status", "VmRSS:"); }
int64_t anonymous_resident_bytes() {
  const int64_t bytes = read_kb_line("/proc/self/status", "RssAnon:");
  return bytes > 0 ? bytes : -1;
}
int64_t peak_resident_bytes() { return read_kb_line("/proc/self/status", "VmHWM:"); }
void forget_peak_resident_bytes() { std::ofstream("/proc/self/clear_refs") << 5; }

}  // namespace narrows
