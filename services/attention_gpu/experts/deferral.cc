#include "services/attention_gpu/experts/deferral.h"

#include "absl/strings/str_cat.h"
#include "services/attention_gpu/experts/deferral_rule.h"

namespace tandem::attention {

absl::Status CheckDeferExperts(const model::ModelConfig& c, int64_t deferred) {
  if (deferred == 0) return absl::OkStatus();
  if (c.num_moe_layers() == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--defer-experts ", deferred, ": the model has no routed experts"));
  }
  if (deferred > 0 && deferred < c.num_experts_per_tok) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--defer-experts ", deferred, ": a token goes to ",
                                                 c.num_experts_per_tok, " experts, of which 0 to ",
                                                 c.num_experts_per_tok - 1, " can be deferred"));
}

void SplitRouting::Assign(const int32_t* ids_in, const float* weights_in, std::span<const int32_t> defers,
                          int64_t k, int64_t deferred) {
  const auto pairs = defers.size() * static_cast<size_t>(k);
  ids.assign(ids_in, ids_in + pairs);
  weights.assign(weights_in, weights_in + pairs);
  later_ids.assign(pairs, -1);
  later_weights.assign(pairs, 0.0f);
  for (size_t t = 0; t < defers.size(); ++t) {
    if (defers[t] == 0) continue;
    const size_t first = t * static_cast<size_t>(k);
    for (int64_t j = 0; j < k; ++j) {
      if (!IsDeferred(weights_in + first, static_cast<int32_t>(k), static_cast<int32_t>(j),
                      static_cast<int32_t>(deferred))) {
        continue;
      }
      const size_t at = first + static_cast<size_t>(j);
      later_ids[at] = ids_in[at];
      later_weights[at] = weights_in[at];
      ids[at] = -1;
      weights[at] = 0;
    }
  }
}

}  // namespace tandem::attention
