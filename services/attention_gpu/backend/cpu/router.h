// Which experts a token goes to. Source: DeepSeek-V3 report (arXiv 2412.19437) section 2.1.2; DeepSeek-V2
// report (arXiv 2405.04434) section 2.1 for the softmax form.
#pragma once

#include <cstdint>

#include "common/model/config.h"

namespace tandem::attention {

// `logits`: [n_routed_experts] of one token. `bias`: [n_routed_experts], for the selection only; may be null.
// Writes num_experts_per_tok ids in falling order of selection score and their weights.
//   scores = sigmoid(logits) or softmax(logits); selection = scores + bias.
//   With n_group > 1 only experts of the topk_group best groups are eligible; a group's score is the sum of
//   its two best selection values (sigmoid models) or its best one (softmax models). weights = scores of the
//   chosen, divided by their sum if norm_topk_prob, times routed_scaling_factor.
// Ties go to the lower id. `scratch`: 2 * n_routed_experts floats.
void Route(const model::ModelConfig& config, const float* logits, const float* bias, int32_t* ids,
           float* weights, float* scratch);

}  // namespace tandem::attention
