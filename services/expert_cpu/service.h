// tandem.v1.Experts over gRPC: what is held, the in-band path of calls, and sessions through shared memory.
// No gRPC types here.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/telemetry/metrics.h"
#include "services/expert_cpu/moe/moe.h"
#include "services/expert_cpu/ring/ring_sessions.h"
#include "services/expert_cpu/shard/shard.h"

namespace grpc {
class Service;
}

namespace tandem::expert {

// How this process presents itself, beside what the shard says.
struct Identity {
  int numa_node = -1;
  int threads = 1;
};

// Thread-safe. One thread of gRPC's a stream; calls of all streams wait for each other in the Moe.
class ExpertsService {
 public:
  // `progress` is what Describe tells until the shard is there. It and `metrics` must outlive this.
  ExpertsService(telemetry::Metrics& metrics, const LoadProgress& progress, const Identity& identity);
  ~ExpertsService();

  grpc::Service* service();
  static std::string name();  // of the service, for health checks

  // From now on calls are answered. Both must outlive the server that this service is registered with.
  // `read_ceiling` is what the pool's threads can read of the shard's memory, bytes a second; 0: not
  // measured.
  void SetReady(const Shard& shard, Moe& moe, double read_ceiling);
  // After SetReady: Attach is answered from now on. The limits of `options` are filled in from the shard.
  absl::Status EnableRing(RingOptions options);
  // Whether clients are there and one has called within the last `d`.
  bool InUse(absl::Duration d) const;
  // No call begins any more: idle streams end at once, busy ones with the answer that is being made. All end
  // with UNAVAILABLE.
  void Stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::expert
