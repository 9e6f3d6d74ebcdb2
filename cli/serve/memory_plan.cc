#include "cli/serve/memory_plan.h"

#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/model/tensors.h"

namespace tandem::cli {
namespace {

constexpr int64_t kSliceMultiple = 256;
constexpr int64_t kChunkTokens = 512;
constexpr int64_t kLogitRows = 8;

// Values that one token needs at a time, roughly: residual and normed hidden state, queries and attention
// output of all heads, the absorbed queries, and the wider of the two inner dimensions.
uint64_t ActivationValues(const model::ModelConfig& c) {
  const int64_t attention = c.num_attention_heads * (c.qk_head_dim() + c.v_head_dim + c.latent_dim());
  const int64_t inner = std::max(c.intermediate_size, c.n_shared_experts * c.moe_intermediate_size);
  return static_cast<uint64_t>(4 * c.hidden_size + attention + 2 * inner);
}

}  // namespace

uint64_t WorkspaceBytes(const model::ModelConfig& config) {
  return ActivationValues(config) * kChunkTokens * sizeof(float) +
         static_cast<uint64_t>(config.vocab_size) * kLogitRows * sizeof(float);
}

std::vector<ExpertShard> ShareExperts(const model::ModelConfig& config, int processes) {
  std::vector<ExpertShard> shards(processes);
  const bool sliced = processes > 1 && config.moe_intermediate_size % (processes * kSliceMultiple) == 0;
  int64_t next = 0;
  for (int i = 0; i < processes; ++i) {
    ExpertShard& shard = shards[i];
    shard.index = i;
    shard.sliced = sliced;
    shard.last_expert = config.n_routed_experts - 1;
    if (sliced) continue;
    const int64_t rest = config.n_routed_experts % processes;
    shard.first_expert = next;
    next += config.n_routed_experts / processes + (i < rest ? 1 : 0);
    shard.last_expert = next - 1;
  }
  return shards;
}

absl::StatusOr<MemoryPlan> PlanMemory(const gguf::File& file, const model::ModelConfig& config,
                                      int64_t context, int processes) {
  MemoryPlan plan;
  std::set<std::pair<int, uint64_t>> kept;  // tensors of one place share their bytes: read and kept once
  for (const gguf::Tensor& tensor : file.tensors()) {
    uint64_t values = 1;
    for (const int64_t n : tensor.ne) values *= static_cast<uint64_t>(n);
    plan.parameters += values;
    if (!kept.emplace(tensor.shard, tensor.file_offset).second) continue;
    (model::IsRoutedExpertTensor(tensor.name) ? plan.expert_bytes : plan.dense_bytes) += tensor.nbytes;
    if (tensor.name == "token_embd.weight" && file.FindTensor("output.weight") != nullptr) {
      plan.embedding_bytes = tensor.nbytes;
    }
  }
  plan.context = context > 0 ? context : config.max_position_embeddings;
  plan.kv_bytes_per_token = static_cast<uint64_t>(config.num_hidden_layers * config.latent_dim()) * 2;
  plan.kv_bytes = plan.kv_bytes_per_token * static_cast<uint64_t>(plan.context);
  plan.workspace_bytes = WorkspaceBytes(config);
  if (config.n_routed_experts == 0) return plan;
  if (processes < 1 || processes > config.n_routed_experts) {
    return absl::InvalidArgumentError(
        absl::StrCat(processes, " expert processes: the model has ", config.n_routed_experts, " experts"));
  }
  plan.shards = ShareExperts(config, processes);
  for (ExpertShard& shard : plan.shards) {
    const uint64_t experts = static_cast<uint64_t>(shard.last_expert - shard.first_expert + 1);
    shard.bytes = shard.sliced ? plan.expert_bytes / plan.shards.size()
                               : plan.expert_bytes / static_cast<uint64_t>(config.n_routed_experts) * experts;
  }
  return plan;
}

}  // namespace tandem::cli
