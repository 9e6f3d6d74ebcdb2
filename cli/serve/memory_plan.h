// Where a model's bytes go: what attention_gpu holds (dense weights, KV cache, workspace) and what each
// expert process holds. From the file's header alone; the weights are not touched.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"

namespace tandem::cli {

// How the routed experts are shared out over `processes` processes of one host.
struct ExpertShard {
  int index = 0;
  bool sliced = false;       // rows [index / n] of every expert; otherwise whole experts
  int64_t first_expert = 0;  // of whole experts: [first, last]
  int64_t last_expert = 0;
  uint64_t bytes = 0;  // of weights, all layers
};

struct MemoryPlan {
  uint64_t parameters = 0;
  uint64_t expert_bytes = 0;        // routed experts, all layers
  uint64_t dense_bytes = 0;         // everything else in the file
  uint64_t embedding_bytes = 0;     // of that: the token embedding, where it is not the output head, too
  int64_t context = 0;              // tokens
  uint64_t kv_bytes_per_token = 0;  // layers * (kv_lora_rank + rope) * 2 bytes
  uint64_t kv_bytes = 0;            // for `context` tokens
  uint64_t workspace_bytes = 0;     // estimate: activations of a chunk of 512 tokens, logits of 8 sequences
  std::vector<ExpertShard> shards;  // empty for a model without routed experts

  // Weights on the GPU. The embedding, of which a token takes one row, stays in the host's memory.
  uint64_t gpu_weight_bytes() const { return dense_bytes - embedding_bytes; }
  uint64_t gpu_bytes() const { return gpu_weight_bytes() + kv_bytes + workspace_bytes; }
  uint64_t total_bytes() const { return gpu_bytes() + embedding_bytes + expert_bytes; }
};

// `context` 0: the model's own. `processes` >= 1, at most one an expert (InvalidArgument otherwise).
absl::StatusOr<MemoryPlan> PlanMemory(const gguf::File& file, const model::ModelConfig& config,
                                      int64_t context, int processes);

// Of attention_gpu's activations and logits, the estimate above.
uint64_t WorkspaceBytes(const model::ModelConfig& config);

// Tensor slices if every slice of the intermediate dimension is a multiple of 256 (the largest quant block),
// ranges of experts otherwise. Byte counts are not filled in.
std::vector<ExpertShard> ShareExperts(const model::ModelConfig& config, int processes);

}  // namespace tandem::cli
