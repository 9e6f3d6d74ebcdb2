// A shard that comes from no file: its weights are made in memory. For benchmarks and tests.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "common/model/config.h"
#include "common/threading/thread_pool.h"
#include "services/expert_cpu/shard/plan.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::expert {

struct GeneratedLayer {
  gguf::TensorType gate = gguf::TensorType::kQ4_K;
  gguf::TensorType up = gguf::TensorType::kQ4_K;
  gguf::TensorType down = gguf::TensorType::kQ4_K;
};

struct GenerateOptions {
  model::ModelConfig config;           // its sizes; layers beyond first_k_dense_replace are MoE layers
  std::vector<GeneratedLayer> layers;  // of each MoE layer
  ShardRequest request;
  ArenaKind arena = ArenaKind::kAuto;
  // Fills `blocks` (of one expert's gate, up or down) with weights of the type; `number` is another one at
  // each call. Called from all threads of the pool.
  std::function<void(gguf::TensorType type, uint64_t number, std::span<uint8_t> blocks)> fill;
};

// Laid out in memory as Shard::Load does it. InvalidArgument: as MakeShardPlan, a number of layers that is
// not the config's, rows that do not fit the types; ResourceExhausted: no memory.
absl::StatusOr<std::unique_ptr<Shard>> GenerateShard(const GenerateOptions& options,
                                                     threading::ThreadPool& pool);

// resident_bytes() of that shard, without making it.
absl::StatusOr<uint64_t> GeneratedBytes(const GenerateOptions& options);

}  // namespace tandem::expert
