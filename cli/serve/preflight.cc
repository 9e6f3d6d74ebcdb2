#include "cli/serve/preflight.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/serve/ports.h"
#include "cli/util/format.h"
#include "cli/util/paths.h"
#include "common/base/status_macros.h"
#include "common/model/cache_sizes.h"
#include "common/model/tensors.h"

namespace tandem::cli {
namespace {

constexpr int64_t kDefaultBatch = 16;               // the engine's (tandem-attention --help)
constexpr uint64_t kBytesPerProcess = 100'000'000;  // code, buffers, thread stacks

}  // namespace

absl::StatusOr<std::string> ResolveModelPath(const ServeOptions& options) {
  std::error_code error;
  if (!options.model.empty()) return options.model;
  if (!options.model_path.empty()) {
    if (std::filesystem::exists(options.model_path, error)) return options.model_path;
    return absl::NotFoundError(
        absl::StrCat(options.model_path,
                     " does not exist here: --model (or --gguf_path) must name a GGUF file or folder"));
  }
  return FindDemoModel();
}

absl::StatusOr<OpenedModel> OpenModel(const std::string& path, const std::string& expert_groups) {
  OpenedModel model;
  model.path = path;
  TANDEM_ASSIGN_OR_RETURN(model.file, gguf::File::Open(path, {.map_data = false}));
  TANDEM_ASSIGN_OR_RETURN(model.config, model::ReadModelConfig(*model.file, expert_groups));
  TANDEM_RETURN_IF_ERROR(model::BindTensors(*model.file, model.config).status());
  for (int64_t layer = 0; layer < model.config.num_hidden_layers; ++layer) {
    if (model.config.n_routed_experts == 0 || !model.config.IsMoe(layer)) continue;
    TANDEM_RETURN_IF_ERROR(model::BindExperts(*model.file, model.config, layer).status());
  }
  return model;
}

uint64_t ServingBytes(const ServeOptions& options, const MemoryPlan& plan, const model::ModelConfig& config,
                      int processes) {
  const int64_t context = options.context > 0 ? options.context : model::DefaultContext(config);
  const int64_t batch = options.max_batch_size > 0 ? options.max_batch_size : kDefaultBatch;
  const int64_t tokens =
      options.kv_tokens > 0 ? options.kv_tokens : model::DefaultCacheTokens(config, context, batch);
  // As the CPU backend keeps it.
  const auto cache = static_cast<uint64_t>(tokens * model::CacheBytesPerToken(config, sizeof(float)));
  const auto host_tier = static_cast<uint64_t>(std::max(0.0, options.kv_host_gb) * 1e9);
  return plan.expert_bytes + plan.dense_bytes + cache + host_tier + plan.workspace_bytes +
         static_cast<uint64_t>(processes) * kBytesPerProcess;
}

uint64_t HostTierBytes(const ServeOptions& options, uint64_t needed, const topology::MemoryInfo& memory) {
  if (options.kv_host_gb >= 0 || options.prefix_cache == "off") return 0;
  const uint64_t usable = memory.UsableBytes();
  return model::DefaultHostTierBytes(usable > needed ? usable - needed : 0);
}

absl::Status CheckMemory(uint64_t needed, const MemoryPlan& plan, const topology::MemoryInfo& memory) {
  const uint64_t usable = memory.UsableBytes();
  if (memory.total_bytes == 0 || needed <= usable) return absl::OkStatus();
  std::string limit;
  if (memory.cgroup_limit_bytes) {
    limit = absl::StrCat(", and this cgroup may use ", FormatBytes(*memory.cgroup_limit_bytes));
  }
  // Where the weights alone would fit, no other model is needed, but less beside them.
  const uint64_t weights = plan.expert_bytes + plan.dense_bytes;
  const uint64_t rest = needed - std::min(needed, weights);
  const bool weights_fit = weights + plan.workspace_bytes < usable;
  return absl::ResourceExhaustedError(
      absl::StrCat("not enough memory: the model needs ", FormatBytes(needed), " (routed experts ",
                   FormatBytes(plan.expert_bytes), ", other weights ", FormatBytes(plan.dense_bytes),
                   ", KV cache, --kv-host-gb and buffers ", FormatBytes(rest), "), available are ",
                   FormatBytes(usable), " of ", FormatBytes(memory.total_bytes), limit,
                   weights_fit ? ". Give a smaller --kv-tokens, --ctx, --max-batch-size or --kv-host-gb"
                               : ". Take a smaller model or quantization",
                   ", end other programs, or say --memory-check=false to try all the same"));
}

absl::Status CheckPorts(const ServeOptions& options, const Ports& ports) {
  TANDEM_RETURN_IF_ERROR(CheckPort(options.host, ports.http, "--port"));
  TANDEM_RETURN_IF_ERROR(CheckPort(options.host, ports.grpc, "--grpc-port"));
  const std::string metrics = MetricsHost(options);
  TANDEM_RETURN_IF_ERROR(CheckPort(metrics, ports.attention_metrics, "--metrics-base-port"));
  for (const int port : ports.expert_metrics) {
    TANDEM_RETURN_IF_ERROR(CheckPort(metrics, port, "--metrics-base-port"));
  }
  return absl::OkStatus();
}

absl::Status CheckPrograms(const std::vector<Process>& processes) {
  std::vector<std::string> missing;
  for (const Process& process : processes) {
    const std::string& program = process.argv.front();
    if (access(program.c_str(), X_OK) == 0) continue;
    if (std::find(missing.begin(), missing.end(), program) == missing.end()) missing.push_back(program);
  }
  if (missing.empty()) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("the installation is not complete: ", absl::StrJoin(missing, ", "),
                                          missing.size() == 1 ? " is" : " are",
                                          " not there or cannot be run"));
}

}  // namespace tandem::cli
