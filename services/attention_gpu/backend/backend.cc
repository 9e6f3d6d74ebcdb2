#include "services/attention_gpu/backend/backend.h"

#include "absl/strings/str_cat.h"

namespace tandem::attention {

absl::Status CheckStepTokens(const StepBatch& batch, int32_t max_step_tokens) {
  if (batch.tokens.size() <= static_cast<size_t>(max_step_tokens)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a step of ", batch.tokens.size(), " tokens, the limit is ", max_step_tokens));
}

}  // namespace tandem::attention
