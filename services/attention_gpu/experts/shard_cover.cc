#include "services/attention_gpu/experts/shard_cover.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace tandem::attention {
namespace {

bool Holds(const ShardExtent& s, int64_t layer) {
  return std::find(s.layers.begin(), s.layers.end(), layer) != s.layers.end();
}

bool Overlap(const ShardExtent& a, const ShardExtent& b) {
  return a.expert_begin < b.expert_end && b.expert_begin < a.expert_end && a.row_begin < b.row_end &&
         b.row_begin < a.row_end;
}

}  // namespace

absl::Status CheckShardCover(const std::vector<ShardExtent>& shards, const model::ModelConfig& c) {
  for (const ShardExtent& s : shards) {
    if (s.expert_begin < 0 || s.expert_begin >= s.expert_end || s.expert_end > c.n_routed_experts ||
        s.row_begin < 0 || s.row_begin >= s.row_end || s.row_end > c.moe_intermediate_size) {
      return absl::FailedPreconditionError(absl::StrCat("expert process ", s.name, " describes experts [",
                                                        s.expert_begin, ", ", s.expert_end, ") and rows [",
                                                        s.row_begin, ", ", s.row_end, "), outside ",
                                                        c.n_routed_experts, " x ", c.moe_intermediate_size));
    }
  }
  const int64_t whole = c.n_routed_experts * c.moe_intermediate_size;
  for (int64_t layer = c.first_k_dense_replace; layer < c.num_hidden_layers; ++layer) {
    int64_t held = 0;
    for (size_t i = 0; i < shards.size(); ++i) {
      const ShardExtent& a = shards[i];
      if (!Holds(a, layer)) continue;
      held += (a.expert_end - a.expert_begin) * (a.row_end - a.row_begin);
      for (size_t j = 0; j < i; ++j) {
        if (Holds(shards[j], layer) && Overlap(a, shards[j])) {
          return absl::FailedPreconditionError(
              absl::StrCat("expert processes ", shards[j].name, " and ", a.name, " both hold experts [",
                           std::max(a.expert_begin, shards[j].expert_begin), ", ",
                           std::min(a.expert_end, shards[j].expert_end), ") rows [",
                           std::max(a.row_begin, shards[j].row_begin), ", ",
                           std::min(a.row_end, shards[j].row_end), ") of layer ", layer));
        }
      }
    }
    if (held != whole) {
      return absl::FailedPreconditionError(
          absl::StrCat("the ", shards.size(), " expert processes together hold ", 100 * held / whole,
                       " % of the experts of layer ", layer, "; is one missing from --expert?"));
    }
  }
  return absl::OkStatus();
}

bool NeedsFloatActivations(const std::vector<std::string>& weight_types) {
  return std::any_of(weight_types.begin(), weight_types.end(),
                     [](const std::string& t) { return t == "F32" || t == "F16" || t == "BF16"; });
}

}  // namespace tandem::attention
