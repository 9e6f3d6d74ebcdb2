// TCP ports: is one free, and if not, who has it.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::cli {

// OK if "host:port" can be listened at. AlreadyExists names the port, the flag that moves it and, where
// /proc lets us see it, the process that has it. Other codes as ProbeListen's; where the host is what is
// wrong, the error names --host.
absl::Status CheckPort(const std::string& host, int port, const std::string& flag);

// A port of `host` that is free now and not among `taken`.
absl::StatusOr<int> FreePort(const std::string& host, const std::vector<int>& taken);

// "python3 (pid 1234)" of a process that listens at the port; empty if it cannot be seen.
std::string PortOwner(int port);

}  // namespace tandem::cli
