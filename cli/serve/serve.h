// `tandem serve`: checks, starts and supervises the processes of one machine.
#pragma once

#include "cli/serve/options.h"

namespace tandem::cli {

// The exit code: 0 after a stop that was asked for, 1 where something failed, 2 for bad values of flags.
int RunServe(const ServeOptions& options);

}  // namespace tandem::cli
