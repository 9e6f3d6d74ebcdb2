#include "common/topology/limits.h"

#include <gtest/gtest.h>

#include "common/topology/testing.h"

namespace tandem::topology {
namespace {

constexpr uint64_t kGiB = 1ull << 30;

void WriteMemInfo(const FakeRoot& root) {
  root.Write("/proc/meminfo",
             "MemTotal:       67108864 kB\nMemFree:         1048576 kB\nMemAvailable:   33554432 kB\n"
             "SwapTotal:       2097152 kB\n");
}

TEST(Limits, MemoryWithoutCgroup) {
  FakeRoot root;
  WriteMemInfo(root);
  const MemoryInfo info = ReadMemoryInfo(root.path());
  EXPECT_EQ(info.total_bytes, 64 * kGiB);
  EXPECT_EQ(info.available_bytes, 32 * kGiB);
  EXPECT_FALSE(info.cgroup_limit_bytes.has_value());
  EXPECT_EQ(info.UsableBytes(), 32 * kGiB);
  EXPECT_EQ(ReadSwapTotalBytes(root.path()), 2 * kGiB);
}

TEST(Limits, CgroupV2TakesTheTightestOfItsParents) {
  FakeRoot root;
  WriteMemInfo(root);
  root.Write("/proc/self/cgroup", "0::/user/job\n");
  root.Write("/sys/fs/cgroup/user/job/memory.max", "max\n");
  root.Write("/sys/fs/cgroup/user/memory.max", "8589934592\n");      // 8 GiB
  root.Write("/sys/fs/cgroup/user/memory.current", "3221225472\n");  // 3 GiB,
  root.Write("/sys/fs/cgroup/user/memory.stat",
             "anon 1\nfile 2147483648\nshmem 1073741824\n");  // 1 GiB of it cache
  root.Write("/sys/fs/cgroup/user/job/cpu.max", "250000 100000\n");
  root.Write("/sys/fs/cgroup/user/cpu.max", "max 100000\n");
  const MemoryInfo info = ReadMemoryInfo(root.path());
  ASSERT_TRUE(info.cgroup_limit_bytes.has_value());
  EXPECT_EQ(*info.cgroup_limit_bytes, 8 * kGiB);
  EXPECT_EQ(info.cgroup_available_bytes, 6 * kGiB);
  EXPECT_EQ(info.UsableBytes(), 6 * kGiB);
  EXPECT_DOUBLE_EQ(ReadCpuQuota(root.path()).value(), 2.5);
}

TEST(Limits, CgroupV1) {
  FakeRoot root;
  WriteMemInfo(root);
  root.Write("/proc/self/cgroup", "5:memory:/box\n4:cpu,cpuacct:/box\n");
  root.Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");  // how v1 says "none"
  root.Write("/sys/fs/cgroup/memory/box/memory.limit_in_bytes", "4294967296\n");
  root.Write("/sys/fs/cgroup/memory/box/memory.usage_in_bytes", "1073741824\n");
  root.Write("/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "50000\n");
  root.Write("/sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n");
  root.Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  root.Write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  const MemoryInfo info = ReadMemoryInfo(root.path());
  ASSERT_TRUE(info.cgroup_limit_bytes.has_value());
  EXPECT_EQ(*info.cgroup_limit_bytes, 4 * kGiB);
  EXPECT_EQ(info.UsableBytes(), 3 * kGiB);
  EXPECT_DOUBLE_EQ(ReadCpuQuota(root.path()).value(), 0.5);
}

TEST(Limits, ALimitAboveTheMachineIsNone) {
  FakeRoot root;
  WriteMemInfo(root);
  root.Write("/proc/self/cgroup", "0::/\n");
  root.Write("/sys/fs/cgroup/memory.max", "1099511627776\n");
  EXPECT_FALSE(ReadMemoryInfo(root.path()).cgroup_limit_bytes.has_value());
  EXPECT_FALSE(ReadCpuQuota(root.path()).has_value());
}

TEST(Limits, HugePages) {
  FakeRoot root;
  root.Write("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
  root.Write("/sys/kernel/mm/transparent_hugepage/shmem_enabled",
             "always within_size advise [never] deny force\n");
  root.Write("/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "100\n");
  root.Write("/sys/devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages", "60\n");
  root.Write("/sys/devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages", "200\n");
  root.Write("/sys/devices/system/node/node1/hugepages/hugepages-1048576kB/free_hugepages", "200\n");
  root.Write("/sys/devices/system/node/nodeless/hugepages/hugepages-2048kB/nr_hugepages", "9\n");
  const HugePages pages = ReadHugePages(root.path());
  EXPECT_EQ(pages.thp, "madvise");
  EXPECT_EQ(pages.shmem, "never");
  ASSERT_EQ(pages.pools.size(), 2u);
  EXPECT_EQ(pages.pools[0].os_node, 0);
  EXPECT_EQ(pages.pools[0].page_bytes, 2u << 20);
  EXPECT_EQ(pages.pools[0].total, 100u);
  EXPECT_EQ(pages.pools[0].free, 60u);
  EXPECT_EQ(pages.pools[1].os_node, 1);
  EXPECT_EQ(pages.pools[1].page_bytes, kGiB);
}

TEST(Limits, AnEmptyRootIsNoError) {
  FakeRoot root;
  EXPECT_EQ(ReadMemoryInfo(root.path()).total_bytes, 0u);
  EXPECT_FALSE(ReadCpuQuota(root.path()).has_value());
  EXPECT_TRUE(ReadHugePages(root.path()).thp.empty());
  EXPECT_FALSE(ReadSwappiness(root.path()).has_value());
}

TEST(Limits, ThisMachineHasMemory) {
  const MemoryInfo info = ReadMemoryInfo();
  EXPECT_GT(info.total_bytes, 0u);
  EXPECT_GT(info.UsableBytes(), 0u);
  EXPECT_LE(info.UsableBytes(), info.total_bytes);
}

}  // namespace
}  // namespace tandem::topology
