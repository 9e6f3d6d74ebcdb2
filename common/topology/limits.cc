#include "common/topology/limits.h"

#include <dirent.h>
#include <sys/resource.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <sstream>
#include <string_view>

namespace tandem::topology {
namespace {

std::optional<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string_view Trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

// "max" and anything that is not a number: nullopt.
std::optional<uint64_t> ToNumber(std::string_view text) {
  text = Trim(text);
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text.empty()) return std::nullopt;
  return value;
}

std::optional<uint64_t> ReadNumber(const std::string& path) {
  const std::optional<std::string> text = ReadFile(path);
  return text ? ToNumber(*text) : std::nullopt;
}

// The number behind `key` in lines of "key value" or "Key:  value kB".
std::optional<uint64_t> Field(const std::string& text, std::string_view key) {
  std::istringstream lines(text);
  std::string line;
  while (std::getline(lines, line)) {
    std::string_view rest = line;
    if (rest.substr(0, key.size()) != key) continue;
    rest.remove_prefix(key.size());
    if (rest.empty() || (rest.front() != ':' && rest.front() != ' ')) continue;
    rest = Trim(rest.substr(1));
    return ToNumber(rest.substr(0, rest.find(' ')));
  }
  return std::nullopt;
}

std::string Join(const std::string& root, std::string_view path) {
  std::string out = root;
  while (!out.empty() && out.back() == '/') out.pop_back();
  out.append(path);
  return out;
}

// The folders of this process's cgroup for `controller` ("" of version 2), innermost first, up to the mount.
// In a container the path of /proc/self/cgroup may not exist below the mount: then only the mount counts.
std::vector<std::string> CgroupFolders(const std::string& root, std::string_view controller) {
  const std::optional<std::string> table = ReadFile(Join(root, "/proc/self/cgroup"));
  if (!table) return {};
  std::istringstream lines(*table);
  std::string line;
  std::optional<std::string> path;
  while (std::getline(lines, line)) {  // "4:cpu,cpuacct:/a/b" or "0::/a/b"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string names = "," + line.substr(first + 1, second - first - 1) + ",";
    if (names.find("," + std::string(controller) + ",") == std::string::npos) continue;
    path = line.substr(second + 1);
    break;
  }
  if (!path) return {};
  const std::string mount =
      Join(root, controller.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + std::string(controller));
  std::vector<std::string> folders;
  while (!path->empty() && *path != "/") {
    folders.push_back(mount + *path);
    path->resize(path->rfind('/') == std::string::npos ? 0 : path->rfind('/'));
  }
  folders.push_back(mount);
  return folders;
}

void TightenMemory(const std::string& limit_file, const std::string& usage_file, const std::string& stat_file,
                   std::string_view cache_key, uint64_t total, MemoryInfo& info) {
  const std::optional<uint64_t> limit = ReadNumber(limit_file);
  if (!limit || (total > 0 && *limit >= total)) return;  // version 1 says "no limit" by a huge number
  const uint64_t usage = ReadNumber(usage_file).value_or(0);
  const std::string stat = ReadFile(stat_file).value_or("");
  // Page cache charged to the group is given back under pressure; shared memory counted in it is not.
  const uint64_t shmem = Field(stat, "shmem").value_or(0);
  const uint64_t file = Field(stat, cache_key).value_or(0);
  const uint64_t cache = file - std::min(file, shmem);
  const uint64_t used = usage - std::min(usage, cache);
  const uint64_t available = *limit - std::min(*limit, used);
  if (!info.cgroup_limit_bytes || available < info.cgroup_available_bytes)
    info.cgroup_available_bytes = available;
  info.cgroup_limit_bytes = std::min(info.cgroup_limit_bytes.value_or(*limit), *limit);
}

// Entries of a folder that begin with `prefix`, followed by a number: the numbers, sorted.
std::vector<uint64_t> NumberedEntries(const std::string& folder, std::string_view prefix,
                                      std::string_view suffix) {
  std::vector<uint64_t> numbers;
  DIR* dir = opendir(folder.c_str());
  if (dir == nullptr) return numbers;
  while (const dirent* entry = readdir(dir)) {
    std::string_view name = entry->d_name;
    if (name.size() <= prefix.size() + suffix.size() || name.substr(0, prefix.size()) != prefix) continue;
    if (name.substr(name.size() - suffix.size()) != suffix) continue;
    name = name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
    if (const std::optional<uint64_t> number = ToNumber(name)) numbers.push_back(*number);
  }
  closedir(dir);
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

void ReadPools(const std::string& folder, int os_node, std::vector<HugePagePool>& pools) {
  for (const uint64_t kib : NumberedEntries(folder, "hugepages-", "kB")) {
    const std::string pool = folder + "/hugepages-" + std::to_string(kib) + "kB/";
    pools.push_back({.os_node = os_node,
                     .page_bytes = kib * 1024,
                     .total = ReadNumber(pool + "nr_hugepages").value_or(0),
                     .free = ReadNumber(pool + "free_hugepages").value_or(0)});
  }
}

ResourceLimit GetLimit(int resource) {
  rlimit limit{};
  if (getrlimit(static_cast<__rlimit_resource>(resource), &limit) != 0) return {};
  ResourceLimit out;
  if (limit.rlim_cur != RLIM_INFINITY) out.soft = limit.rlim_cur;
  if (limit.rlim_max != RLIM_INFINITY) out.hard = limit.rlim_max;
  return out;
}

}  // namespace

uint64_t MemoryInfo::UsableBytes() const {
  return cgroup_limit_bytes ? std::min(available_bytes, cgroup_available_bytes) : available_bytes;
}

MemoryInfo ReadMemoryInfo(const std::string& root) {
  MemoryInfo info;
  const std::string meminfo = ReadFile(Join(root, "/proc/meminfo")).value_or("");
  info.total_bytes = Field(meminfo, "MemTotal").value_or(0) * 1024;
  info.available_bytes =
      Field(meminfo, "MemAvailable").value_or(Field(meminfo, "MemFree").value_or(0)) * 1024;
  for (const std::string& folder : CgroupFolders(root, "")) {
    TightenMemory(folder + "/memory.max", folder + "/memory.current", folder + "/memory.stat", "file",
                  info.total_bytes, info);
  }
  for (const std::string& folder : CgroupFolders(root, "memory")) {
    TightenMemory(folder + "/memory.limit_in_bytes", folder + "/memory.usage_in_bytes",
                  folder + "/memory.stat", "total_cache", info.total_bytes, info);
  }
  return info;
}

std::optional<double> ReadCpuQuota(const std::string& root) {
  std::optional<double> quota;
  const auto tighten = [&quota](double cpus) { quota = std::min(quota.value_or(cpus), cpus); };
  for (const std::string& folder : CgroupFolders(root, "")) {
    const std::string text = ReadFile(folder + "/cpu.max").value_or("");  // "150000 100000" or "max 100000"
    const size_t space = text.find(' ');
    if (space == std::string::npos) continue;
    const std::optional<uint64_t> time = ToNumber(std::string_view(text).substr(0, space));
    const std::optional<uint64_t> period = ToNumber(std::string_view(text).substr(space));
    if (time && period && *period > 0) tighten(static_cast<double>(*time) / static_cast<double>(*period));
  }
  for (const std::string& folder : CgroupFolders(root, "cpu")) {
    const std::optional<uint64_t> time = ReadNumber(folder + "/cpu.cfs_quota_us");  // "-1": no limit
    const std::optional<uint64_t> period = ReadNumber(folder + "/cpu.cfs_period_us");
    if (time && period && *period > 0) tighten(static_cast<double>(*time) / static_cast<double>(*period));
  }
  return quota;
}

std::string SelectedWord(const std::string& text) {
  const size_t open = text.find('[');
  const size_t close = text.find(']', open == std::string::npos ? 0 : open);
  if (open != std::string::npos && close != std::string::npos) return text.substr(open + 1, close - open - 1);
  return std::string(Trim(text));
}

HugePages ReadHugePages(const std::string& root) {
  HugePages out;
  const std::string thp = Join(root, "/sys/kernel/mm/transparent_hugepage/");
  out.thp = SelectedWord(ReadFile(thp + "enabled").value_or(""));
  out.shmem = SelectedWord(ReadFile(thp + "shmem_enabled").value_or(""));
  const std::string nodes = Join(root, "/sys/devices/system/node");
  for (const uint64_t node : NumberedEntries(nodes, "node", "")) {
    ReadPools(nodes + "/node" + std::to_string(node) + "/hugepages", static_cast<int>(node), out.pools);
  }
  if (out.pools.empty()) ReadPools(Join(root, "/sys/kernel/mm/hugepages"), 0, out.pools);
  return out;
}

ResourceLimit MemlockLimit() { return GetLimit(RLIMIT_MEMLOCK); }
ResourceLimit OpenFilesLimit() { return GetLimit(RLIMIT_NOFILE); }

std::optional<int> ReadSwappiness(const std::string& root) {
  const std::optional<uint64_t> value = ReadNumber(Join(root, "/proc/sys/vm/swappiness"));
  if (!value || *value > 1000) return std::nullopt;
  return static_cast<int>(*value);
}

uint64_t ReadSwapTotalBytes(const std::string& root) {
  return Field(ReadFile(Join(root, "/proc/meminfo")).value_or(""), "SwapTotal").value_or(0) * 1024;
}

}  // namespace tandem::topology
