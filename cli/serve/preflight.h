// What `tandem serve` looks at before it starts anything: the model, the memory, the ports, the programs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/serve/launch_plan.h"
#include "cli/serve/memory_plan.h"
#include "cli/serve/options.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"
#include "common/topology/limits.h"

namespace tandem::cli {

struct OpenedModel {
  std::string path;
  std::unique_ptr<gguf::File> file;  // header only
  model::ModelConfig config;
};

// The path of --model, else of --model-path if it exists, else the demo model. NotFound otherwise.
absl::StatusOr<std::string> ResolveModelPath(const ServeOptions& options);

// Opens the header and checks every tensor that the services will look for. Errors are those of gguf and
// model.
absl::StatusOr<OpenedModel> OpenModel(const std::string& path, const std::string& expert_groups);

// Bytes that serving takes beyond the page cache's leave: weights, the KV cache that the engine will reserve,
// a share for each process.
uint64_t ServingBytes(const ServeOptions& options, const MemoryPlan& plan, const model::ModelConfig& config,
                      int processes);

// What the engine will add for pages that leave the cache where --kv-host-gb is not given: a part of what
// `needed` leaves, so that it is never what does not fit.
uint64_t HostTierBytes(const ServeOptions& options, uint64_t needed, const topology::MemoryInfo& memory);

// ResourceExhausted with the numbers if `needed` exceeds what is there.
absl::Status CheckMemory(uint64_t needed, const MemoryPlan& plan, const topology::MemoryInfo& memory);

// Every port of `ports`; the error names port, flag and, if it can be seen, the process that has it.
absl::Status CheckPorts(const ServeOptions& options, const Ports& ports);

// NotFound names the programs that are not beside this one.
absl::Status CheckPrograms(const std::vector<Process>& processes);

}  // namespace tandem::cli
