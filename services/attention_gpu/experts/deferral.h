// Expert deferral (--defer-experts n): the n experts of the smallest weights of a generated token may take a
// layer longer. Their weighted sum in MoE layer l is added to the token's hidden state behind the FFN of
// layer l + 1, so that the experts compute while layer l + 1's attention runs; nothing of the last layer is
// deferred. It changes answers, which is why it is off by default. The idea: "KTransformers: Unleashing the
// Full Potential of CPU/GPU Hybrid Inference for MoE Models" (SOSP 2025).
//
// Whether a token defers is its own property, not the step's: those that were generated do
// (StepSequence::generated_from), those of a prompt do not, whatever else is in the step and however often
// they are computed. So texts do not depend on company, on preemption, or on an engine that took over.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "common/model/config.h"

namespace tandem::attention {

// A call that the device waits for a layer later is in flight while the next two are made.
constexpr uint32_t kDeferralSlots = 4;

// InvalidArgument: `deferred` is not from 0 to k - 1, k experts being a token's; names both.
absl::Status CheckDeferExperts(const model::ModelConfig& config, int64_t deferred);

// A layer's routing in two calls: what is due in the layer itself, and what may come later. Both have a place
// for each of a token's k experts, -1 with weight 0 where the expert is in the other call.
struct SplitRouting {
  std::vector<int32_t> ids, later_ids;        // [tokens, k]
  std::vector<float> weights, later_weights;  // [tokens, k]

  // ids_in, weights_in: [defers.size(), k]; token t defers if defers[t] is not 0.
  void Assign(const int32_t* ids_in, const float* weights_in, std::span<const int32_t> defers, int64_t k,
              int64_t deferred);
};

}  // namespace tandem::attention
