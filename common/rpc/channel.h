// gRPC client channels with our limits: no compression, large messages, keepalive, quick reconnects.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/rpc/server.h"

namespace grpc {
class Channel;
class Status;
}  // namespace grpc

namespace tandem::rpc {

// `address` as in ServerOptions::listen, or a DNS name with port.
// A lost connection is made again only while a call waits on the channel (set_wait_for_ready, with a
// deadline) or WaitServing runs; calls that fail at once do not give it the time. `tls_name`, if not empty,
// is the name that the peer's certificate must hold (an address that was looked up does not tell).
absl::StatusOr<std::shared_ptr<grpc::Channel>> Connect(const std::string& address, const TlsOptions& tls = {},
                                                       const std::string& tls_name = "");

// Waits until the peer's health service says SERVING. DeadlineExceeded says what the last answer was.
absl::Status WaitServing(grpc::Channel& channel, const std::string& address, absl::Duration patience);

// Whether the peer's health service says anything at all.
bool Answers(grpc::Channel& channel, absl::Duration patience);

// The one place where codes are mapped.
absl::Status FromGrpc(const grpc::Status& status);
grpc::Status ToGrpc(const absl::Status& status);
int HttpStatusOf(absl::StatusCode code);  // InvalidArgument 400, NotFound 404, ResourceExhausted 429, ...

}  // namespace tandem::rpc
