#include "services/gateway/session/request_log.h"

#include <algorithm>
#include <cstdio>
#include <random>

#include "common/telemetry/log.h"

namespace tandem::gateway {
namespace {

std::mt19937_64& Random() {
  thread_local std::mt19937_64 engine = [] {
    std::random_device device;
    std::seed_seq seed{device(), device(), device(), device()};
    return std::mt19937_64(seed);
  }();
  return engine;
}

}  // namespace

uint64_t RandomSeed() { return Random()(); }

std::string MakeId(const std::string& prefix) {
  char digits[33];
  snprintf(digits, sizeof(digits), "%016llx%016llx", static_cast<unsigned long long>(Random()()),
           static_cast<unsigned long long>(Random()()));
  return prefix + std::string(digits, 24);
}

std::string PerformanceLine(const std::vector<GenerationResult>& results, double tokenize_seconds) {
  double computed = 0, decoded = 0, prefill = 0, decode = 0;
  for (const GenerationResult& result : results) {
    computed += result.prompt_tokens - result.cached_prompt_tokens;
    decoded += result.completion_tokens > 1 ? result.completion_tokens - 1 : 0;
    prefill += result.prefill_seconds;
    decode = std::max(decode, result.decode_seconds);
  }
  char line[256];
  snprintf(line, sizeof(line),
           "Performance(T/s): prefill %.2f, decode %.2f. Time(s): tokenize %.3f, prefill %.3f, decode %.3f",
           prefill > 0 ? computed / prefill : 0.0, decode > 0 ? decoded / decode : 0.0, tokenize_seconds,
           prefill, decode);
  return line;
}

Outcome OutcomeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return Outcome::kOk;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kNotFound:
      return Outcome::kInvalid;
    case absl::StatusCode::kResourceExhausted:
      return Outcome::kRefused;
    case absl::StatusCode::kCancelled:
      return Outcome::kCancelled;
    case absl::StatusCode::kDeadlineExceeded:
      return Outcome::kTimeout;
    default:
      return Outcome::kError;
  }
}

void RecordRequest(const std::string& id, const std::vector<GenerationResult>& results,
                   double tokenize_seconds, double request_seconds, GatewayMetrics& metrics) {
  absl::Status status;
  for (const GenerationResult& result : results) {
    if (status.ok() || status.code() == absl::StatusCode::kCancelled) status.Update(result.status);
    // A failure of one sequence cancels the others of its request: the failure is what counts.
    if (!result.status.ok() && result.status.code() != absl::StatusCode::kCancelled) status = result.status;
  }
  metrics.requests(OutcomeOf(status)).Add();
  metrics.tokenize_seconds.Observe(tokenize_seconds);
  metrics.request_seconds.Observe(request_seconds);
  const std::string line = PerformanceLine(results, tokenize_seconds);
  if (status.ok()) {
    spdlog::info("{} [{}]", line, id);
  } else {
    spdlog::info("{} [{}] ended: {}", line, id, std::string(status.message()));
  }
}

}  // namespace tandem::gateway
