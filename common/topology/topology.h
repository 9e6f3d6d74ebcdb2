// What the machine is made of, as far as this process may use it: sockets, NUMA nodes, cores, memory.
//
// Found by hwloc, cut down to the CPUs of the process's affinity mask and cgroup. `simulated_nodes` = N makes
// N nodes of whatever is there, so that a machine with one node runs the code of many.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::topology {

struct Core {
  int socket = 0;
  std::vector<int> cpus;  // OS numbers of its hardware threads, as far as allowed; never empty
};

struct Node {
  int index = 0;                   // position in Topology::nodes()
  std::vector<int> os_nodes;       // OS numbers of the NUMA nodes whose memory it stands for; never empty
  bool simulated = false;          // shares its memory with others, or joins several
  std::vector<Core> cores;         // never empty; simulated nodes share cores if there are too few
  uint64_t memory_bytes = 0;       // installed; of a simulated node its share
  uint64_t memory_free_bytes = 0;  // unused, page cache not counted; 0 if unknown

  // OS numbers in the order in which threads should take them: one hardware thread of every core, then the
  // second ones.
  std::vector<int> CpusInOrder() const;
};

// Threads of one node.
struct ThreadPlan {
  int node = 0;
  int threads = 0;
  std::vector<int> cpus;  // thread i is to run on cpus[i % size]; distinct, at most `threads` of them
};

// Immutable after Detect; copies share the hwloc handle. Thread-safe.
class Topology {
 public:
  struct Options {
    int simulated_nodes = 0;  // 0: the real ones
    // An hwloc synthetic description instead of this machine: "pack:2 [numa] core:4 pu:2".
    std::string synthetic = "";
    std::string root = "/";  // where /proc and /sys are, for tests
  };
  // InvalidArgument: a negative or absurd (> 64) number of nodes, a bad synthetic description. Internal:
  // hwloc finds no CPU.
  static absl::StatusOr<Topology> Detect(const Options& options);
  static absl::StatusOr<Topology> Detect() { return Detect(Options()); }

  const std::vector<Node>& nodes() const { return nodes_; }  // never empty
  int sockets() const { return sockets_; }
  int cores() const { return cores_; }  // distinct, over all nodes
  int cpus() const { return cpus_; }    // hardware threads, distinct
  // Nodes that have memory but none of the allowed CPUs, by OS number: not used.
  const std::vector<int>& unused_nodes() const { return unused_nodes_; }
  const std::string& cpu_model() const { return cpu_model_; }  // "AMD EPYC 7542 32-Core Processor"
  const std::vector<std::string>& cpu_flags() const { return cpu_flags_; }  // sorted: "amx_int8", "avx2", ...
  bool HasFlag(const std::string& flag) const;
  double cpu_quota() const { return cpu_quota_; }  // CPUs' worth of time the cgroup grants; 0: no limit

  // Shares `total_threads` out over the first `nodes` nodes (0: all), as evenly as their cores allow.
  // Physical cores are filled before second hardware threads. 0 threads: one a physical core, but no more
  // than the cgroup's CPU quota. Every node gets at least one. InvalidArgument: negative numbers, more nodes
  // than there are.
  absl::StatusOr<std::vector<ThreadPlan>> PlanThreads(int total_threads, int nodes = 0) const;

  // Asks for the pages of [ptr, ptr + bytes) to come from `node` (an index into nodes()), interleaved where
  // it stands for several OS nodes; pages already touched are moved if they can be. OK, without doing
  // anything, where there is only one OS node. Best effort: containers often forbid it, and the caller can go
  // on (PermissionDenied, Unimplemented, Internal say why).
  absl::Status BindMemory(void* ptr, uint64_t bytes, int node) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
  std::vector<Node> nodes_;
  std::vector<int> unused_nodes_;
  int sockets_ = 0;
  int cores_ = 0;
  int cpus_ = 0;
  int os_nodes_ = 0;
  std::string cpu_model_;
  std::vector<std::string> cpu_flags_;
  double cpu_quota_ = 0;
};

}  // namespace tandem::topology
