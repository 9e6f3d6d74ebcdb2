// How many tokens a sequence may have.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "services/gateway/session/model_context.h"

namespace tandem::gateway {

// The new tokens that a sequence may get: `asked`, no more than the context leaves. OutOfRange, with the
// numbers: the prompt leaves no room; InvalidArgument: it is empty, or a token is not of the vocabulary.
absl::StatusOr<uint32_t> NewTokensFor(const ModelContext& model, const std::vector<int32_t>& prompt,
                                      std::optional<uint32_t> asked);

}  // namespace tandem::gateway
