// The engine's Prometheus metrics, from the scheduler's snapshots.
#pragma once

#include <cstdint>

#include "common/telemetry/metrics.h"
#include "services/attention_gpu/scheduler/scheduler.h"

namespace tandem::attention {

// Not thread-safe.
class EngineMetrics {
 public:
  explicit EngineMetrics(telemetry::Metrics& m);
  void Update(const SchedulerSnapshot& now);

 private:
  telemetry::Gauge &running_, &waiting_, &kv_used_, &kv_cached_, &host_used_;
  telemetry::Counter &prompt_, &generated_, &query_, &hit_, &evicted_, &host_stored_, &host_returned_,
      &host_evicted_, &preemptions_, &reattach_;
  SchedulerSnapshot last_;
};

}  // namespace tandem::attention
