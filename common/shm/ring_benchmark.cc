// Round trips through the ring between two processes. Each line is one measurement with its own child
// process; the counters are microseconds.
#include <benchmark/benchmark.h>

#include "common/shm/round_trip.h"

namespace tandem::shm {
namespace {

// Arguments: rows of a call (0: empty), microseconds of spinning.
void BM_Ring(benchmark::State& state) {
  RingMeasurement how;
  how.rows = static_cast<uint32_t>(state.range(0));
  how.wait.spin = absl::Microseconds(state.range(1));
  how.calls = state.range(1) > 0 ? 200'000 : 20'000;
  how.warm_up = how.calls / 10;
  if (state.range(1) > 0 && AllowedCpus() > 1) {  // spinning needs a CPU for each
    how.client_cpu = 0;
    how.host_cpu = 1;
  }
  for (auto _ : state) {
    const absl::StatusOr<RoundTrip> r = MeasureRing(how);
    if (!r.ok()) {
      state.SkipWithError(r.status().ToString().c_str());
      return;
    }
    state.SetIterationTime(r->mean * 1e-6);
    state.counters["min_us"] = r->min;
    state.counters["p50_us"] = r->p50;
    state.counters["p99_us"] = r->p99;
  }
}
BENCHMARK(BM_Ring)
    ->ArgNames({"rows", "spin_us"})
    ->ArgsProduct({{0, 1}, {10'000, 0}})
    ->UseManualTime()
    ->Iterations(1)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace tandem::shm
