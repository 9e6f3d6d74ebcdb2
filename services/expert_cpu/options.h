// The flags of tandem-expert, which may also come from the environment and a file: common/flags/sources.h.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/kernels/kernels.h"
#include "common/rpc/server.h"
#include "services/expert_cpu/shard/arena.h"
#include "services/expert_cpu/shard/plan.h"

namespace tandem::expert {

struct Options {
  std::string model;
  std::vector<std::string> listen;
  std::string metrics_listen;  // empty: none
  ShardRequest shard;
  int threads = 0;        // 0: one a CPU of the list, or one a physical core
  std::vector<int> cpus;  // empty: those of the NUMA node, or unpinned
  int numa_node = -1;     // -1: not bound
  int numa_nodes = 0;     // simulated ones; 0: the machine's own
  kernels::Precision precision = kernels::Precision::kFast;
  int64_t max_tokens = 4096;
  int load_threads = 8;
  ArenaKind arena = ArenaKind::kAuto;
  bool memory_check = true;   // refuse a shard that is larger than the memory that is free
  bool ring = true;           // clients on this host may call through shared memory
  std::string ring_socket;    // where its regions are handed over; empty: chosen from `listen`
  int64_t ring_spin_us = -1;  // how long a session's thread looks for calls before it sleeps; -1: measured
  rpc::TlsOptions tls;
};

// nullopt: the process is to end with *exit_code: 0 after --help and --version, 2 after an error, which is
// said on stderr.
std::optional<Options> ParseOptions(int argc, const char* const* argv, int* exit_code);

}  // namespace tandem::expert
