// TCP addresses as users write them ("127.0.0.1:10010", "localhost:0", "[::]:10010"), and whether one can be
// listened at: servers of other libraries only say "failed", this says why. Thread-safe: no state.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem {

struct HostPort {
  std::string host;  // without brackets, never empty
  int port = 0;      // 0 to 65535

  bool IsWildcard() const;       // 0.0.0.0 or ::
  std::string ToString() const;  // IPv6 hosts in brackets
};

// InvalidArgument names the address and what is wrong with it.
absl::StatusOr<HostPort> ParseHostPort(const std::string& address);

// The numeric addresses that a listener at `address` would bind, names resolved. NotFound: no such name.
absl::StatusOr<std::vector<HostPort>> ResolveListen(const std::string& address);

// OK if a socket could be bound to every one of them that this machine has; nothing stays bound.
// AlreadyExists: in use; PermissionDenied: a privileged port; NotFound: not an address of this machine.
absl::Status ProbeListen(const std::string& address);

// Connects to a numeric address and hangs up at once; failures do not matter.
void TouchTcp(const HostPort& at);

}  // namespace tandem
