// Checks of tandem.v1.GenerationRequest.
#pragma once

#include "absl/status/statusor.h"
#include "services/gateway/grpc/generation_service.h"
#include "services/gateway/session/generation.h"
#include "services/gateway/session/model_context.h"

namespace tandem::v1 {
class GenerationRequest;
}

namespace tandem::gateway {

// The sequence that is asked for. InvalidArgument names the field and its range; NotFound the model;
// OutOfRange: the prompt is longer than the context.
absl::StatusOr<GenerationSpec> SpecOf(const v1::GenerationRequest& request, const ModelContext& model,
                                      const GenerationServiceOptions& options);

}  // namespace tandem::gateway
