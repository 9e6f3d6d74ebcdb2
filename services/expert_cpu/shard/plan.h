// Which part of a model's routed experts a process holds: whole experts of a range, or a slice of every one
// along the intermediate dimension, or both. Thread-safe: plain data.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/model/config.h"

namespace tandem::expert {

struct ShardRequest {
  int64_t slice_index = 0;  // slice k of n, k in [0, n)
  int64_t slice_count = 1;
  int64_t expert_begin = 0;  // [begin, end)
  int64_t expert_end = -1;   // -1: all of the model's
};

struct ShardPlan {
  std::vector<int64_t> layers;  // block numbers of the MoE layers, rising
  int64_t hidden_size = 0;
  int64_t moe_intermediate_size = 0;  // of the model
  int64_t n_routed_experts = 0;       // of the model
  int64_t num_experts_per_tok = 0;
  int64_t expert_begin = 0;  // [begin, end) are held
  int64_t expert_end = 0;
  int64_t row_begin = 0;  // rows [begin, end) of the intermediate dimension are held
  int64_t row_end = 0;

  int64_t experts() const { return expert_end - expert_begin; }
  int64_t rows() const { return row_end - row_begin; }
  std::string DebugString() const;  // "experts 0-127 of 256, rows 0-1023 of 2048, 58 layers"
};

// Slices begin at multiples of kernels::kLeaf rows, which is where partial sums can be taken apart; they
// differ by at most one leaf. InvalidArgument tells the numbers: more slices than leaves (and that expert
// ranges work), an index or a range that the model does not have, a model without routed experts.
absl::StatusOr<ShardPlan> MakeShardPlan(const model::ModelConfig& config, const ShardRequest& request);

}  // namespace tandem::expert
