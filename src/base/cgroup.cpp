// Version 2 has one line "0::/path"; version 1 a line "number:controllers:/path" a hierarchy. In a container
// the path is often that of the host, which is not there: the mount's own root is looked at in any case.
#include "base/cgroup.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

namespace narrows {

namespace {

/// Folders of a group and of all above it, up to `mount`.
std::vector<std::string> folders(const std::string& mount, std::string path) {
  std::vector<std::string> all;
  const bool good = path.rfind('/', 0) == 0 && path.find("..") == std::string::npos;
  while (good && path.size() > 1) {
    all.push_back(mount + path);
    path.erase(path.rfind('/'));
  }
  all.push_back(mount);
  return all;
}

std::optional<int64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  int64_t v = 0;
  if (file >> v) return v;
  return std::nullopt;  // "max" and a missing file alike: no limit
}

/// The number after `name` in a file of lines "name number".
int64_t read_line(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  int64_t v = 0;
  while (file >> word >> v) {
    if (word == name) return v;
  }
  return 0;
}

void limit_cpus(CgroupLimits& limits, double quota, double period) {
  if (quota <= 0 || period <= 0) return;
  limits.cpus = std::min(limits.cpus.value_or(quota / period), quota / period);
}

void limit_memory(CgroupLimits& limits, std::optional<int64_t> most, int64_t used) {
  if (!most || *most <= 0) return;
  const int64_t left = std::max<int64_t>(1, *most - used);
  limits.memory_left = std::min(limits.memory_left.value_or(left), left);
}

void look_at_v2(CgroupLimits& limits, const std::string& folder) {
  std::ifstream cpu(folder + "/cpu.max");
  double quota = 0, period = 0;
  if (cpu >> quota >> period) limit_cpus(limits, quota, period);
  // memory.current counts cached file pages, which the kernel gives back: "anon" is what cannot go.
  limit_memory(limits, read_number(folder + "/memory.max"), read_line(folder + "/memory.stat", "anon"));
}

void look_at_v1(CgroupLimits& limits, const std::string& folder) {
  limit_cpus(limits, static_cast<double>(read_number(folder + "/cpu.cfs_quota_us").value_or(-1)),
             static_cast<double>(read_number(folder + "/cpu.cfs_period_us").value_or(0)));
  limit_memory(limits, read_number(folder + "/memory.limit_in_bytes"),
               read_line(folder + "/memory.stat", "total_rss"));
}

}  // namespace

CgroupLimits cgroup_limits(const std::string& self, const std::string& root) {
  CgroupLimits limits;
  std::ifstream file(self);
  std::string line;
  while (std::getline(file, line)) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1),
                      path = line.substr(second + 1);
    if (controllers.empty()) {
      for (const std::string& mount : {root, root + "/unified"}) {
        for (const std::string& folder : folders(mount, path)) look_at_v2(limits, folder);
      }
      continue;
    }
    std::vector<std::string> mounts = {root + "/" + controllers};  // "cpu,cpuacct"
    std::stringstream names(controllers);
    for (std::string name; std::getline(names, name, ',');) {
      if (name != controllers && (name == "cpu" || name == "memory")) mounts.push_back(root + "/" + name);
    }
    for (const std::string& mount : mounts) {
      for (const std::string& folder : folders(mount, path)) look_at_v1(limits, folder);
    }
  }
  return limits;
}

int usable_cores(int allowed, const CgroupLimits& limits) {
  if (limits.cpus) allowed = static_cast<int>(std::min<double>(allowed, std::ceil(*limits.cpus)));
  return std::max(1, allowed);
}

int usable_cores() {
  int allowed = static_cast<int>(std::thread::hardware_concurrency());
  // A machine may have more cores than the fixed set has bits: then the call asks for a larger one.
  for (int n = 1024; n <= 1 << 16; n *= 2) {
    cpu_set_t* set = CPU_ALLOC(n);
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(n);
    const bool known = ::sched_getaffinity(0, bytes, set) == 0;
    if (known) allowed = CPU_COUNT_S(bytes, set);
    CPU_FREE(set);
    if (known) break;
  }
  return usable_cores(allowed, cgroup_limits());
}

}  // namespace narrows
