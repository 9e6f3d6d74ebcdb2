#include "services/attention_gpu/backend/backend.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace tandem::attention {

absl::Status CheckStepTokens(const StepBatch& batch, int32_t max_step_tokens) {
  if (batch.tokens.size() <= static_cast<size_t>(max_step_tokens)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a step of ", batch.tokens.size(), " tokens, the limit is ", max_step_tokens));
}

bool HasGeneratedTokens(const StepBatch& batch) {
  return std::any_of(batch.sequences.begin(), batch.sequences.end(), [](const StepSequence& s) {
    return s.count > 0 && s.position + s.count > s.generated_from;
  });
}

}  // namespace tandem::attention
