// What is said of a request when it has ended: the log line and the metrics.
#pragma once

#include <string>
#include <vector>

#include "services/gateway/session/gateway_metrics.h"
#include "services/gateway/session/generation.h"

namespace tandem::gateway {

// "Performance(T/s): prefill P, decode D. Time(s): tokenize T, prefill P, decode D". P counts the prompt
// tokens that were computed. Of several sequences: their sums, and the longest decode time.
std::string PerformanceLine(const std::vector<GenerationResult>& results, double tokenize_seconds);

// Logs a request that was started, and counts it.
void RecordRequest(const std::string& id, const std::vector<GenerationResult>& results,
                   double tokenize_seconds, double request_seconds, GatewayMetrics& metrics);

Outcome OutcomeOf(const absl::Status& status);

// "chatcmpl-" and 24 random hexadecimal digits.
std::string MakeId(const std::string& prefix);
uint64_t RandomSeed();

}  // namespace tandem::gateway
