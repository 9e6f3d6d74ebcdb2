// What the kernel and the cgroup grant this process: memory, CPU time, huge pages, resource limits.
// Read anew at each call. Thread-safe. `root` is where /proc and /sys are, for tests.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tandem::topology {

struct MemoryInfo {
  uint64_t total_bytes = 0;      // MemTotal
  uint64_t available_bytes = 0;  // MemAvailable: free plus what the kernel can take back without swapping
  std::optional<uint64_t> cgroup_limit_bytes;  // the tightest of the cgroup and its parents
  uint64_t cgroup_available_bytes = 0;         // below that limit, page cache counted as available

  // What a process may still take before something has to give.
  uint64_t UsableBytes() const;
};
MemoryInfo ReadMemoryInfo(const std::string& root = "/");

// CPUs' worth of time; nullopt: no limit. The tightest of the cgroup and its parents (v2 cpu.max, v1 cfs
// quota).
std::optional<double> ReadCpuQuota(const std::string& root = "/");

struct HugePagePool {
  int os_node = 0;
  uint64_t page_bytes = 0;
  uint64_t total = 0;  // pages
  uint64_t free = 0;
};
struct HugePages {
  std::string thp;    // transparent_hugepage/enabled: "always", "madvise", "never"; empty: not there
  std::string shmem;  // transparent_hugepage/shmem_enabled: "always", "within_size", "advise", "never", ...
  std::vector<HugePagePool> pools;  // reserved pages of each node and size; sizes without pages included
};
HugePages ReadHugePages(const std::string& root = "/");

// The word in brackets of "always [madvise] never"; the trimmed text if there are none.
std::string SelectedWord(const std::string& text);

struct ResourceLimit {
  std::optional<uint64_t> soft;  // nullopt: unlimited
  std::optional<uint64_t> hard;
};
ResourceLimit MemlockLimit();  // bytes
ResourceLimit OpenFilesLimit();

std::optional<int> ReadSwappiness(const std::string& root = "/");
uint64_t ReadSwapTotalBytes(const std::string& root = "/");

}  // namespace tandem::topology
