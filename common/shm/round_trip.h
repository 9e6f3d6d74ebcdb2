// How long it takes to call another process and to have its answer.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/shm/flag.h"

namespace tandem::shm {

// Microseconds.
struct RoundTrip {
  int64_t calls = 0;
  double min = 0, p50 = 0, p99 = 0, mean = 0;
};

// Calls `call` `warm_up` times and then `calls` times (at least once), one after the other, and times each of
// the latter. Either ends early when it has taken half of `most`. The first error ends it.
absl::StatusOr<RoundTrip> MeasureRoundTrips(int64_t warm_up, int64_t calls, absl::Duration most,
                                            const std::function<absl::Status()>& call);

struct RingMeasurement {
  int64_t calls = 100'000;
  int64_t warm_up = 10'000;
  absl::Duration most = absl::Seconds(10);
  WaitPolicy wait = {absl::Milliseconds(10)};  // of both sides
  int client_cpu = -1, host_cpu = -1;          // to pin the sides to; -1: not pinned
  uint32_t rows = 0;                           // 0: empty calls; else the host writes `rows` rows of zeros
  uint32_t width = 7168;
};

// Empty calls over a call region: this process calls, a child made with fork answers, so call it while this
// process has a single thread, or where a fork with several does no harm (the child does nothing but answer).
absl::StatusOr<RoundTrip> MeasureRing(const RingMeasurement& how);

}  // namespace tandem::shm
