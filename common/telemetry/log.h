// Logging of a service: spdlog to stderr, one line an event, "2026-01-31 12:00:00.123 I attention: text".
#pragma once

#include <string>

#include <spdlog/spdlog.h>

namespace tandem::telemetry {

// Once at start-up. `service` stands in every line. Level from TANDEM_LOG (trace, debug, info, warn, error),
// default info. An unknown level is said and taken as info.
void InitLog(const std::string& service);

}  // namespace tandem::telemetry
