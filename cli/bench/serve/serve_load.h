// `tandem bench serve`: a load of chat or completion requests against any server that speaks OpenAI's API.
#pragma once

#include "absl/status/status.h"
#include "cli/bench/report.h"
#include "cli/bench/serve/options.h"

namespace tandem::cli {

// InvalidArgument: a flag, or flags that do not go together; Unavailable: the server; DataLoss: requests
// failed or were answered wrongly (the figures are reported all the same).
absl::Status BenchServe(const ServeLoadOptions& options, Report& report);

}  // namespace tandem::cli
