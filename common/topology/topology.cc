#include "common/topology/topology.h"

#include <hwloc.h>
#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/topology/limits.h"

namespace tandem::topology {
namespace {

constexpr int kMaxNodes = 64;

class Bitmap {
 public:
  Bitmap() : bits_(hwloc_bitmap_alloc()) {}
  explicit Bitmap(hwloc_const_bitmap_t other) : bits_(hwloc_bitmap_dup(other)) {}
  ~Bitmap() { hwloc_bitmap_free(bits_); }
  Bitmap(const Bitmap&) = delete;
  Bitmap& operator=(const Bitmap&) = delete;
  hwloc_bitmap_t get() const { return bits_; }

 private:
  hwloc_bitmap_t bits_;
};

std::string RootPath(const std::string& root, const char* path) {
  std::string out = root;
  while (!out.empty() && out.back() == '/') out.pop_back();
  return out + path;
}

// "key : value" of the first processor in /proc/cpuinfo.
std::string CpuInfoField(const std::string& root, const std::string& key) {
  std::ifstream file(RootPath(root, "/proc/cpuinfo"));
  std::string line;
  while (std::getline(file, line)) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    if (line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1) != key) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

uint64_t NodeFreeBytes(const std::string& root, int os_node) {
  std::ifstream file(RootPath(root, "/sys/devices/system/node/node") + std::to_string(os_node) + "/meminfo");
  std::string line;
  while (std::getline(file, line)) {  // "Node 0 MemFree:  123 kB"
    std::istringstream words(line);
    std::string node, number, key;
    uint64_t kib = 0;
    if (words >> node >> number >> key >> kib && key == "MemFree:") return kib * 1024;
  }
  return 0;
}

// The CPUs that this process may run on: what hwloc was allowed to see and the affinity mask. The mask is
// read from the kernel itself, since hwloc reports the binding only where it was asked to.
void IntersectAffinity(hwloc_bitmap_t cpus) {
  const int size = 8192;
  cpu_set_t* mask = CPU_ALLOC(size);
  if (mask == nullptr) return;
  const size_t bytes = CPU_ALLOC_SIZE(size);
  CPU_ZERO_S(bytes, mask);
  if (sched_getaffinity(0, bytes, mask) == 0) {
    Bitmap allowed;
    for (int cpu = 0; cpu < size; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, mask)) hwloc_bitmap_set(allowed.get(), cpu);
    }
    if (hwloc_bitmap_intersects(cpus, allowed.get())) hwloc_bitmap_and(cpus, cpus, allowed.get());
  }
  CPU_FREE(mask);
}

std::vector<int> ToVector(hwloc_const_bitmap_t bits) {
  std::vector<int> out;
  for (int i = hwloc_bitmap_first(bits); i >= 0; i = hwloc_bitmap_next(bits, i)) out.push_back(i);
  return out;
}

int SocketOf(hwloc_topology_t topology, hwloc_obj_t core) {
  const hwloc_obj_t package = hwloc_get_ancestor_obj_by_type(topology, HWLOC_OBJ_PACKAGE, core);
  return package == nullptr ? 0 : static_cast<int>(package->logical_index);
}

// The allowed cores whose hardware threads lie in `cpuset`. Kernels without core information: every CPU is
// one.
std::vector<Core> CoresOf(hwloc_topology_t topology, hwloc_const_bitmap_t cpuset,
                          hwloc_const_bitmap_t allowed) {
  std::vector<Core> cores;
  const bool has_cores = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE) > 0;
  const hwloc_obj_type_t type = has_cores ? HWLOC_OBJ_CORE : HWLOC_OBJ_PU;
  hwloc_obj_t object = nullptr;
  while ((object = hwloc_get_next_obj_by_type(topology, type, object)) != nullptr) {
    Bitmap usable(object->cpuset);
    hwloc_bitmap_and(usable.get(), usable.get(), cpuset);
    hwloc_bitmap_and(usable.get(), usable.get(), allowed);
    if (hwloc_bitmap_iszero(usable.get())) continue;
    cores.push_back({.socket = SocketOf(topology, object), .cpus = ToVector(usable.get())});
  }
  return cores;
}

// Shares of `total` for `parts` takers: as even as whole numbers allow, the first ones get the rest.
int64_t Share(int64_t total, int64_t parts, int64_t i) { return total / parts + (i < total % parts ? 1 : 0); }

// `count` nodes of the real ones: the cores in order, cut into runs of even length; with fewer cores than
// nodes, node i gets core i mod cores.
std::vector<Node> Simulate(const std::vector<Node>& real, int count) {
  std::vector<std::pair<const Node*, const Core*>> cores;
  for (const Node& node : real) {
    for (const Core& core : node.cores) cores.emplace_back(&node, &core);
  }
  const auto n = static_cast<int64_t>(cores.size());
  std::vector<Node> out(count);
  int64_t next = 0;
  for (int i = 0; i < count; ++i) {
    Node& node = out[i];
    node.index = i;
    node.simulated = true;
    const int64_t take = n >= count ? Share(n, count, i) : 1;
    const int64_t first = n >= count ? next : i % n;
    next += take;
    std::set<int> os_nodes;
    for (int64_t c = first; c < first + take; ++c) {
      node.cores.push_back(*cores[c].second);
      os_nodes.insert(cores[c].first->os_nodes.begin(), cores[c].first->os_nodes.end());
    }
    node.os_nodes.assign(os_nodes.begin(), os_nodes.end());
  }
  for (const Node& from : real) {  // memory: split evenly between the simulated nodes that stand for it
    std::vector<Node*> users;
    for (Node& node : out) {
      if (std::find(node.os_nodes.begin(), node.os_nodes.end(), from.os_nodes.front()) !=
          node.os_nodes.end()) {
        users.push_back(&node);
      }
    }
    for (Node* user : users) {
      user->memory_bytes += from.memory_bytes / users.size();
      user->memory_free_bytes += from.memory_free_bytes / users.size();
    }
  }
  return out;
}

}  // namespace

struct Topology::Impl {
  hwloc_topology_t topology = nullptr;
  bool this_system = true;
  ~Impl() {
    if (topology != nullptr) hwloc_topology_destroy(topology);
  }
};

std::vector<int> Node::CpusInOrder() const {
  std::vector<int> out;
  for (size_t level = 0;; ++level) {
    const size_t before = out.size();
    for (const Core& core : cores) {
      if (level < core.cpus.size()) out.push_back(core.cpus[level]);
    }
    if (out.size() == before) return out;
  }
}

absl::StatusOr<Topology> Topology::Detect(const Options& options) {
  if (options.simulated_nodes < 0 || options.simulated_nodes > kMaxNodes) {
    return absl::InvalidArgumentError(
        absl::StrCat("number of NUMA nodes ", options.simulated_nodes, ": must be 1 to ", kMaxNodes));
  }
  auto impl = std::make_shared<Impl>();
  if (hwloc_topology_init(&impl->topology) != 0) return absl::InternalError("hwloc_topology_init failed");
  const hwloc_topology_t topology = impl->topology;
  impl->this_system = options.synthetic.empty();
  if (!impl->this_system && hwloc_topology_set_synthetic(topology, options.synthetic.c_str()) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("hwloc does not understand the synthetic topology \"", options.synthetic, "\""));
  }
  if (hwloc_topology_load(topology) != 0) {
    return absl::InternalError(absl::StrCat("hwloc_topology_load: ", std::strerror(errno)));
  }
  Bitmap allowed(hwloc_topology_get_allowed_cpuset(topology));
  if (impl->this_system) IntersectAffinity(allowed.get());

  Topology out;
  std::vector<Node> nodes;
  hwloc_obj_t object = nullptr;
  while ((object = hwloc_get_next_obj_by_type(topology, HWLOC_OBJ_NUMANODE, object)) != nullptr) {
    Node node;
    const int os_index = static_cast<int>(object->os_index);
    node.os_nodes = {os_index};
    node.memory_bytes = object->attr != nullptr ? object->attr->numanode.local_memory : 0;
    node.memory_free_bytes = impl->this_system ? NodeFreeBytes(options.root, os_index) : node.memory_bytes;
    ++out.os_nodes_;
    node.cores = CoresOf(topology, object->cpuset, allowed.get());
    // Memory of a second kind (HBM, CXL) shows as a node with the CPUs of another: the first one keeps them.
    const bool duplicate =
        !node.cores.empty() && std::any_of(nodes.begin(), nodes.end(), [&](const Node& other) {
          return other.cores.front().cpus == node.cores.front().cpus;
        });
    if (node.cores.empty() || duplicate) {
      out.unused_nodes_.push_back(os_index);
      continue;
    }
    node.index = static_cast<int>(nodes.size());
    nodes.push_back(std::move(node));
  }
  if (nodes.empty()) {  // no node owns an allowed CPU: one node of all of them
    Node node;
    node.os_nodes = {0};
    node.cores = CoresOf(topology, allowed.get(), allowed.get());
    if (node.cores.empty()) return absl::InternalError("hwloc finds no CPU that this process may use");
    node.memory_bytes = ReadMemoryInfo(options.root).total_bytes;
    nodes.push_back(std::move(node));
  }

  std::set<int> sockets;
  for (const Node& node : nodes) {
    for (const Core& core : node.cores) {
      sockets.insert(core.socket);
      out.cpus_ += static_cast<int>(core.cpus.size());
    }
    out.cores_ += static_cast<int>(node.cores.size());
  }
  out.sockets_ = static_cast<int>(sockets.size());
  const bool as_asked =
      options.simulated_nodes == 0 || options.simulated_nodes == static_cast<int>(nodes.size());
  out.nodes_ = as_asked ? std::move(nodes) : Simulate(nodes, options.simulated_nodes);
  if (impl->this_system) {
    out.cpu_model_ = CpuInfoField(options.root, "model name");
    std::istringstream flags(CpuInfoField(options.root, "flags"));
    std::string flag;
    while (flags >> flag) out.cpu_flags_.push_back(flag);
    std::sort(out.cpu_flags_.begin(), out.cpu_flags_.end());
    out.cpu_quota_ = ReadCpuQuota(options.root).value_or(0);
  }
  out.impl_ = std::move(impl);
  return out;
}

bool Topology::HasFlag(const std::string& flag) const {
  return std::binary_search(cpu_flags_.begin(), cpu_flags_.end(), flag);
}

absl::StatusOr<std::vector<ThreadPlan>> Topology::PlanThreads(int total_threads, int nodes) const {
  const int all = static_cast<int>(nodes_.size());
  if (total_threads < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("number of threads ", total_threads, ": must not be negative"));
  }
  if (nodes < 0 || nodes > all) {
    return absl::InvalidArgumentError(absl::StrCat("threads for ", nodes, " NUMA nodes: there are ", all));
  }
  const int used = nodes == 0 ? all : nodes;
  std::vector<std::vector<int>> cpus;
  std::set<int> first_threads;  // of distinct cores
  for (int i = 0; i < used; ++i) {
    cpus.push_back(nodes_[i].CpusInOrder());
    for (const Core& core : nodes_[i].cores) first_threads.insert(core.cpus.front());
  }
  int total = total_threads;
  if (total == 0) {
    total = static_cast<int>(first_threads.size());
    if (cpu_quota_ > 0) total = std::min(total, static_cast<int>(std::max(1.0, std::floor(cpu_quota_))));
  }
  total = std::max(total, used);

  // One thread at a time to the node that is relatively emptiest: first while it has physical cores left,
  // then while it has hardware threads left, then beyond.
  std::vector<int> threads(used, 1);
  const auto load = [&](int i) {
    const int physical = static_cast<int>(nodes_[i].cores.size());
    const int logical = static_cast<int>(cpus[i].size());
    const int tier = threads[i] < physical ? 0 : threads[i] < logical ? 1 : 2;
    const int room = tier == 0 ? physical : logical;
    return std::pair<int, double>(tier, static_cast<double>(threads[i]) / room);
  };
  for (int placed = used; placed < total; ++placed) {
    int best = 0;
    for (int i = 1; i < used; ++i) {
      if (load(i) < load(best)) best = i;
    }
    ++threads[best];
  }
  std::vector<ThreadPlan> plan;
  for (int i = 0; i < used; ++i) {
    std::vector<int> chosen = cpus[i];
    chosen.resize(std::min<size_t>(chosen.size(), threads[i]));
    plan.push_back({.node = i, .threads = threads[i], .cpus = std::move(chosen)});
  }
  return plan;
}

absl::Status Topology::BindMemory(void* ptr, uint64_t bytes, int node) const {
  if (node < 0 || node >= static_cast<int>(nodes_.size())) {
    return absl::InvalidArgumentError(absl::StrCat("NUMA node ", node, ": there are ", nodes_.size()));
  }
  if (!impl_->this_system) return absl::UnimplementedError("a synthetic topology has no memory");
  if (os_nodes_ <= 1 || bytes == 0) return absl::OkStatus();
  Bitmap set;
  for (const int os_node : nodes_[node].os_nodes) hwloc_bitmap_set(set.get(), os_node);
  const hwloc_membind_policy_t policy =
      nodes_[node].os_nodes.size() > 1 ? HWLOC_MEMBIND_INTERLEAVE : HWLOC_MEMBIND_BIND;
  if (hwloc_set_area_membind(impl_->topology, ptr, bytes, set.get(), policy,
                             HWLOC_MEMBIND_BYNODESET | HWLOC_MEMBIND_MIGRATE) == 0) {
    return absl::OkStatus();
  }
  const int error = errno;
  const std::string message =
      absl::StrCat("binding ", bytes, " bytes to NUMA node ", node, ": ", std::strerror(error));
  if (error == EPERM || error == EACCES) return absl::PermissionDeniedError(message);
  if (error == ENOSYS) return absl::UnimplementedError(message);
  return absl::InternalError(message);
}

}  // namespace tandem::topology
