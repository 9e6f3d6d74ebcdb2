// An ExpertGroup inside the test's own process: shards of expert_cpu without the wire between.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/kernels/kernels.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "services/attention_gpu/experts/shard_weights.h"
#include "services/expert_cpu/shard/plan.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::golden {

// One shard for each request; activations travel as float32 for kReference and as bfloat16 for kFast, as they
// do between processes.
absl::StatusOr<std::unique_ptr<attention::ExpertGroup>> MakeLocalExperts(
    const std::string& model_path, const std::vector<expert::ShardRequest>& shards,
    kernels::Precision precision, int threads);

// Where a shard's weights lie, as a client that mapped them sees it: in `memory`, a copy or another mapping
// of the shard's arena.
attention::ShardWeights WeightsOf(const expert::Shard& shard, std::span<const std::byte> memory);
// In the arena itself.
attention::ShardWeights WeightsOf(const expert::Shard& shard);

}  // namespace tandem::golden
