// Experts.Attach: sessions through shared memory. Each has a region of its own and a thread that answers its
// calls; the gRPC stream is its lease.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/shm/flag.h"
#include "common/shm/memory.h"
#include "services/expert_cpu/moe/moe.h"

namespace grpc {
class ServerContext;
class Status;
template <class W, class R>
class ServerReaderWriter;
}  // namespace grpc
namespace tandem::v1 {
class AttachRequest;
class AttachResponse;
}  // namespace tandem::v1

namespace tandem::expert {

struct RingOptions {
  std::string socket_path;                   // where regions are handed over; absolute
  absl::Duration lease = absl::Seconds(10);  // a client that is silent for so long is taken for dead
  shm::WaitPolicy wait;                      // for the next call
  int cpu = -1;                              // to pin the sessions' threads to; -1: not pinned
  // Most of what a client may ask for.
  int64_t max_tokens = 0;   // of a call
  int64_t max_pairs = 0;    // experts of a token
  int64_t hidden_size = 0;  // what it is, rather
};

// The socket path for a process that listens at `address` (unix:PATH or HOST:PORT): beside PATH, else in the
// folder for sockets of this user, else of temporary files.
std::string RingSocketPath(const std::string& address);

// Thread-safe.
class RingSessions {
 public:
  // Answers one call: a call, or why it is none (to be returned, and counted).
  using Compute =
      std::function<absl::StatusOr<CallStatistics>(const absl::StatusOr<Call>&, std::span<uint8_t> answer)>;
  using Stream = grpc::ServerReaderWriter<v1::AttachResponse, v1::AttachRequest>;

  static absl::StatusOr<std::unique_ptr<RingSessions>> Start(const RingOptions& options, Compute compute);
  ~RingSessions();  // no Serve may run

  // The handler of Attach: returns when the session is over and its region unmapped.
  grpc::Status Serve(grpc::ServerContext* context, Stream* stream);

  // Offers another descriptor at the same socket. Of those that nobody has come for the latest few are kept.
  absl::StatusOr<std::string> Offer(const shm::FileDescriptor& fd);
  const std::string& socket_path() const;

  // Idle sessions end at once, busy ones after the answer that is being made; new ones are refused.
  void Stop();

 private:
  class Session;
  struct Impl;
  explicit RingSessions(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::expert
