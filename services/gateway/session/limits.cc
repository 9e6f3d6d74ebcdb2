#include "services/gateway/session/limits.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace tandem::gateway {

absl::StatusOr<uint32_t> NewTokensFor(const ModelContext& model, const std::vector<int32_t>& prompt,
                                      std::optional<uint32_t> asked) {
  if (prompt.empty()) return absl::InvalidArgumentError("the prompt is empty");
  const uint32_t vocabulary = model.limits().vocab_size;
  for (size_t i = 0; i < prompt.size(); ++i) {
    if (prompt[i] < 0 || static_cast<uint32_t>(prompt[i]) >= vocabulary) {
      return absl::InvalidArgumentError(absl::StrCat("token ", i, " of the prompt is ", prompt[i],
                                                     "; the vocabulary's ids are 0 to ", vocabulary - 1));
    }
  }
  const uint64_t context = model.limits().context_length;
  if (prompt.size() >= context) {
    const size_t told = std::min(prompt.size(), model.MostTokens());
    return absl::OutOfRangeError(absl::StrCat(
        "this model's context is ", context, " tokens, and the prompt has ",
        told < prompt.size() ? "more than " : "", told, "; at least one must be left for the answer"));
  }
  const uint64_t room = context - prompt.size();
  return static_cast<uint32_t>(std::min<uint64_t>(asked.value_or(UINT32_MAX), room));
}

}  // namespace tandem::gateway
