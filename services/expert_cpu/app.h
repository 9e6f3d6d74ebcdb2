// The life of the process: open the ports, load the shard, serve until a signal comes, stop.
#pragma once

#include "services/expert_cpu/options.h"

namespace tandem::expert {

// The exit code: 0 after SIGTERM or SIGINT, 1 if something could not be started (said on the log). To be
// called once, before other threads are started.
int Run(const Options& options);

}  // namespace tandem::expert
