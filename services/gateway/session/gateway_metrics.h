// The gateway's metrics (names and units: docs/architecture.md).
#pragma once

#include "common/telemetry/metrics.h"

namespace tandem::gateway {

enum class Outcome { kOk, kInvalid, kRefused, kCancelled, kTimeout, kError };

class GatewayMetrics {
 public:
  explicit GatewayMetrics(telemetry::Metrics& metrics);

  telemetry::Counter& requests(Outcome outcome) { return *outcomes_[static_cast<size_t>(outcome)]; }

  telemetry::Counter& prompt_tokens;
  telemetry::Counter& cached_prompt_tokens;
  telemetry::Counter& generated_tokens;
  telemetry::Counter& resumes;
  telemetry::Histogram& prefill_rate;
  telemetry::Histogram& decode_rate;
  telemetry::Histogram& time_to_first_token;
  telemetry::Histogram& inter_token;
  telemetry::Histogram& request_seconds;
  telemetry::Histogram& queue_seconds;
  telemetry::Histogram& tokenize_seconds;
  telemetry::Gauge& running;  // sequences that have their first token
  telemetry::Gauge& waiting;  // admitted ones that do not
  telemetry::Gauge& ready;

 private:
  telemetry::Counter* outcomes_[6];
};

}  // namespace tandem::gateway
