// What the control groups of Linux leave to this process: containers and services are limited by them, and
// neither the number of cores nor the memory of the machine says so.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace narrows {

struct CgroupLimits {
  std::optional<double> cpus;          ///< cores' worth of time, may be a fraction
  std::optional<int64_t> memory_left;  ///< bytes: limit less what cannot be given back, at least 1
};

/// The least of all limits on the path from the process's group up to the root, version 1 and 2 alike.
/// self: the file that names the groups, root: where they are mounted; others for tests. Files that are
/// missing or hold something else are no limit.
CgroupLimits cgroup_limits(const std::string& self = "/proc/self/cgroup",
                           const std::string& root = "/sys/fs/cgroup");

/// The whole cores that this process may use: those it is allowed to run on, and no more than the group's
/// share of time, rounded up; at least 1.
int usable_cores();
/// The same of given numbers.
int usable_cores(int allowed, const CgroupLimits& limits);

}  // namespace narrows
