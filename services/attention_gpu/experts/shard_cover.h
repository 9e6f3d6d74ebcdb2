// Do the shards of several expert processes make up a whole model?
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/model/config.h"

namespace tandem::attention {

struct ShardExtent {
  std::string name;  // for errors: the process's address
  std::vector<int64_t> layers;
  int64_t expert_begin = 0, expert_end = 0;  // experts [begin, end)
  int64_t row_begin = 0, row_end = 0;        // intermediate rows [begin, end) of each
};

// OK if every (expert, row) of every MoE layer is held by exactly one of them. FailedPrecondition says which
// are missing or held twice, and by whom.
absl::Status CheckShardCover(const std::vector<ShardExtent>& shards, const model::ModelConfig& config);

// Activations travel as bfloat16 where the experts quantize them to 8 bits anyway, and as float32 where a
// weight type is a float type: there the rounding would be the largest error of all.
bool NeedsFloatActivations(const std::vector<std::string>& weight_types);

}  // namespace tandem::attention
