// Internal to common/rpc: listening and connecting addresses, TLS files, gRPC's lifetime.
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::rpc {

// The path of "unix:/path" or "unix:///path"; nullopt if the address is of another kind.
std::optional<std::string> UnixPath(const std::string& address);

// OK if a server can bind a socket at `path`. Removes a socket file that nobody listens at. AlreadyExists: a
// server listens there, or the file is something else than a socket.
absl::Status PrepareUnixPath(const std::string& path);

// A PEM file's text. NotFound / InvalidArgument name the file and `what` it is to be.
absl::StatusOr<std::string> ReadPem(const std::string& file, const char* what);

// Keeps gRPC's own threads until the process ends. Left alone, gRPC takes itself down with its last channel
// or server, and that waits up to ten seconds for a poller of writes that were cut off. Cheap to call again.
void KeepGrpc();

}  // namespace tandem::rpc
