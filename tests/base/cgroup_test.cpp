// Limits of control groups, read from made-up folders as version 1 and 2 have them; and that affinity counts.
#include "base/cgroup.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <filesystem>

#include "base/memory.h"
#include "temp_dir.h"

namespace narrows {
namespace {

class CgroupTest : public ::testing::Test {
 protected:
  void put(const std::string& path, const std::string& content) const {
    std::filesystem::create_directories(std::filesystem::path(dir_.path(path)).parent_path());
    dir_.file(path, content);
  }
  CgroupLimits limits(const std::string& self) const {
    return cgroup_limits(dir_.file("self", self), dir_.path("root"));
  }
  testing::TempDir dir_;
};

TEST_F(CgroupTest, NothingIsNoLimit) {
  EXPECT_FALSE(cgroup_limits(dir_.path("none"), dir_.path("none")).cpus);
  for (const char* self : {"", "0::/\n", "nonsense\n:\n", "4:memory:/a/b\n0::/../x\n", "0::abc\n4:cpu:\n"}) {
    EXPECT_FALSE(limits(self).cpus) << self;
    EXPECT_FALSE(limits(self).memory_left) << self;
  }
  put("root/cpu.max", "max 100000\n");
  put("root/memory.max", "max\n");
  EXPECT_FALSE(limits("0::/\n").cpus);
  EXPECT_FALSE(limits("0::/\n").memory_left);
}

TEST_F(CgroupTest, TheLeastOnThePathCounts) {
  put("root/a/b/cpu.max", "400000 100000\n");
  put("root/a/cpu.max", "150000 100000\n");
  put("root/cpu.max", "max 100000\n");
  put("root/a/b/memory.max", "max\n");
  put("root/a/memory.max", "1000000\n");
  put("root/a/memory.stat", "file 900000\nanon 300000\n");
  put("root/memory.max", "5000000\n");
  const CgroupLimits found = limits("0::/a/b\n");
  EXPECT_EQ(found.cpus, 1.5);
  EXPECT_EQ(found.memory_left, 700000);
  EXPECT_EQ(limits("0::/not/there\n").memory_left, 5000000);  // a path of the host, in a container
  put("root/a/memory.stat", "anon 2000000\n");
  EXPECT_EQ(limits("0::/a/b\n").memory_left, 1);
}

TEST_F(CgroupTest, VersionOneHasAFolderAController) {
  put("root/cpu,cpuacct/box/cpu.cfs_quota_us", "-1\n");
  put("root/cpu,cpuacct/cpu.cfs_quota_us", "250000\n");
  put("root/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  put("root/memory/box/memory.limit_in_bytes", "2000000\n");
  put("root/memory/box/memory.stat", "rss 1\ntotal_rss 500000\n");
  put("root/memory/memory.limit_in_bytes", "9223372036854771712\n");
  const CgroupLimits found = limits("5:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n0::/\n");
  EXPECT_EQ(found.cpus, 2.5);
  EXPECT_EQ(found.memory_left, 1500000);
  put("root/cpu/cpu.cfs_quota_us", "50000\n");
  put("root/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(limits("2:cpuacct,cpu:/box\n").cpus, 0.5);
}

TEST_F(CgroupTest, QuotasAreRoundedUpToCores) {
  EXPECT_EQ(usable_cores(8, {}), 8);
  EXPECT_EQ(usable_cores(8, {.cpus = 1.5, .memory_left = {}}), 2);
  EXPECT_EQ(usable_cores(2, {.cpus = 16, .memory_left = {}}), 2);
  EXPECT_EQ(usable_cores(8, {.cpus = 0.1, .memory_left = {}}), 1);
  EXPECT_EQ(usable_cores(0, {}), 1);
}

TEST(UsableCores, AreThoseThatTheProcessMayRunOn) {
  EXPECT_GE(usable_cores(), 1);
  EXPECT_GT(available_memory_bytes(), 0);
  cpu_set_t before, one;
  ASSERT_EQ(::sched_getaffinity(0, sizeof(before), &before), 0);
  CPU_ZERO(&one);
  int first = 0;
  while (!CPU_ISSET(first, &before)) ++first;
  CPU_SET(first, &one);
  ASSERT_EQ(::sched_setaffinity(0, sizeof(one), &one), 0);
  EXPECT_EQ(usable_cores(), 1);
  ASSERT_EQ(::sched_setaffinity(0, sizeof(before), &before), 0);
}

}  // namespace
}  // namespace narrows
