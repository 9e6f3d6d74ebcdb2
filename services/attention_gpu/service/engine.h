// The whole process: opens the model, attaches the experts, serves until stopped.
#pragma once

#include "absl/status/status.h"
#include "common/rpc/lifecycle.h"
#include "services/attention_gpu/service/options.h"

namespace tandem::attention {

// Returns when `stop` was received and running sequences have ended, or with the error that prevented
// serving.
absl::Status RunEngine(const Options& options, rpc::StopSignal& stop);

}  // namespace tandem::attention
