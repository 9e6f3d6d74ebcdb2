// Which processes `tandem serve` starts on this machine, with which arguments. Pure: decides, starts nothing.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/serve/memory_plan.h"
#include "cli/serve/options.h"
#include "common/model/config.h"
#include "common/topology/topology.h"

namespace tandem::cli {

struct Process {
  std::string name;               // "expert0", "attention", "gateway"
  std::vector<std::string> argv;  // argv[0]: the program's path
  std::string health;             // address of its gRPC health service, or "http://host:port/ready"
  int stop_order = 0;             // gateway 0, attention 1, experts 2
};

// Ports with 0 and -1 already resolved. A metrics port of 0 stands for none.
struct Ports {
  int http = 0;
  int grpc = 0;
  int attention_metrics = 0;
  std::vector<int> expert_metrics;  // one a process
};

// Where the children's metrics listen: at the server's host, so that they are for this machine alone unless
// the whole server is meant for the network. The library that serves them knows no IPv6: for an IPv6 host
// that is 127.0.0.1, for "::" 0.0.0.0.
std::string MetricsHost(const ServeOptions& options);

// Port numbers from the options: the documented defaults, derived from --port where that was moved, free ones
// where 0 was asked for. Fails where no free port can be had.
absl::StatusOr<Ports> ChoosePorts(const ServeOptions& options, int expert_processes);

// `model`: the resolved path; `runtime`: folder for the Unix sockets; `programs`: where the binaries are.
absl::StatusOr<std::vector<Process>> PlanProcesses(const ServeOptions& options, const std::string& model,
                                                   const model::ModelConfig& config,
                                                   const topology::Topology& topology, const Ports& ports,
                                                   const std::string& runtime, const std::string& programs);

}  // namespace tandem::cli
