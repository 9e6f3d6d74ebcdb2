#include "services/expert_cpu/shard/plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/kernels/kernels.h"

namespace tandem::expert {

std::string ShardPlan::DebugString() const {
  return absl::StrCat("experts ", expert_begin, "-", expert_end - 1, " of ", n_routed_experts, ", rows ",
                      row_begin, "-", row_end - 1, " of ", moe_intermediate_size, ", ", layers.size(),
                      " layers");
}

absl::StatusOr<ShardPlan> MakeShardPlan(const model::ModelConfig& config, const ShardRequest& request) {
  if (config.n_routed_experts <= 0 || config.num_moe_layers() <= 0) {
    return absl::InvalidArgumentError("the model has no routed experts: there is nothing to hold here");
  }
  ShardPlan plan;
  plan.hidden_size = config.hidden_size;
  plan.moe_intermediate_size = config.moe_intermediate_size;
  plan.n_routed_experts = config.n_routed_experts;
  plan.num_experts_per_tok = config.num_experts_per_tok;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (config.IsMoe(layer)) plan.layers.push_back(layer);
  }

  plan.expert_begin = request.expert_begin;
  plan.expert_end = request.expert_end < 0 ? config.n_routed_experts : request.expert_end;
  if (plan.expert_begin < 0 || plan.expert_begin >= plan.expert_end ||
      plan.expert_end > config.n_routed_experts) {
    return absl::InvalidArgumentError(absl::StrCat("experts [", plan.expert_begin, ", ", plan.expert_end,
                                                   ") are asked for, the model has [0, ",
                                                   config.n_routed_experts, ")"));
  }

  const int64_t k = request.slice_index, n = request.slice_count;
  if (n < 1 || k < 0 || k >= n) {
    return absl::InvalidArgumentError(
        absl::StrCat("slice ", k, "/", n, ": the index must be from 0 to the number of slices less 1"));
  }
  const int64_t inner = config.moe_intermediate_size;
  const int64_t leaves = (inner + kernels::kLeaf - 1) / kernels::kLeaf;
  if (n > leaves) {
    return absl::InvalidArgumentError(
        absl::StrCat("slice ", k, "/", n, ": the experts' intermediate dimension is ", inner,
                     ", which can be cut only at multiples of ", kernels::kLeaf, " and so into at most ",
                     leaves, leaves == 1 ? " slice" : " slices", "; share the ", config.n_routed_experts,
                     " experts out by ranges instead (--experts)"));
  }
  plan.row_begin = leaves * k / n * kernels::kLeaf;
  plan.row_end = std::min(leaves * (k + 1) / n * kernels::kLeaf, inner);
  return plan;
}

}  // namespace tandem::expert
