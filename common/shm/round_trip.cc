#include "common/shm/round_trip.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"
#include "common/shm/call_client.h"
#include "common/shm/call_host.h"
#include "common/shm/memory.h"

namespace tandem::shm {
namespace {

void Pin(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);
}

// The child's life.
[[noreturn]] void Serve(CallHost& host, int cpu) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  Pin(cpu);
  IncomingCall call;
  for (;;) {
    const absl::Status next = host.Next(absl::Seconds(10), &call);
    if (!next.ok()) _exit(1);
    std::memset(call.output.data(), 0, call.output.size());
    host.Answer(call, call.valid, {});
  }
}

}  // namespace

absl::StatusOr<RoundTrip> MeasureRoundTrips(int64_t warm_up, int64_t calls, absl::Duration most,
                                            const std::function<absl::Status()>& call) {
  using Clock = std::chrono::steady_clock;
  const auto half = absl::ToChronoNanoseconds(most / 2);
  Clock::time_point end = Clock::now() + half;
  for (int64_t i = 0; i < warm_up && Clock::now() < end; ++i) TANDEM_RETURN_IF_ERROR(call());
  std::vector<double> us;
  us.reserve(static_cast<size_t>(std::max<int64_t>(1, calls)));
  end = Clock::now() + half;
  do {
    const Clock::time_point begin = Clock::now();
    TANDEM_RETURN_IF_ERROR(call());
    const Clock::time_point after = Clock::now();
    us.push_back(std::chrono::duration<double, std::micro>(after - begin).count());
    if (after >= end) break;
  } while (static_cast<int64_t>(us.size()) < calls);
  std::sort(us.begin(), us.end());
  RoundTrip out;
  out.calls = static_cast<int64_t>(us.size());
  out.min = us.front();
  out.p50 = us[us.size() / 2];
  out.p99 = us[us.size() * 99 / 100];
  out.mean = std::accumulate(us.begin(), us.end(), 0.0) / static_cast<double>(us.size());
  return out;
}

absl::StatusOr<RoundTrip> MeasureRing(const RingMeasurement& how) {
  RegionShape shape;
  shape.max_rows = std::max<uint32_t>(1, how.rows);
  shape.max_pairs = 8;
  shape.width = how.width;
  TANDEM_ASSIGN_OR_RETURN(const RegionLayout layout, RegionLayout::Of(shape));
  TANDEM_ASSIGN_OR_RETURN(const SharedMemory memory,
                          SharedMemory::Create("tandem-round-trip", layout.region_bytes()));
  const SessionId session{1, 1};
  CallHost host(memory.data(), layout, session, how.wait);
  const pid_t child = fork();
  if (child < 0) return absl::InternalError(absl::StrCat("fork: ", std::strerror(errno)));
  if (child == 0) Serve(host, how.host_cpu);
  cpu_set_t before;
  const bool restore = how.client_cpu >= 0 && sched_getaffinity(0, sizeof before, &before) == 0;
  Pin(how.client_cpu);
  CallClient client(memory.data(), layout, session, how.wait);
  const auto call = [&]() -> absl::Status {
    TANDEM_ASSIGN_OR_RETURN(const OutgoingCall to,
                            client.Prepare(1, how.rows, 8, ValueType::kBf16, ValueType::kF32));
    std::memset(to.ids.data(), 0xff, to.ids.size());
    std::memset(to.weights.data(), 0, to.weights.size());
    std::memset(to.input.data(), 0, to.input.size());
    TANDEM_RETURN_IF_ERROR(client.Ring());
    TANDEM_ASSIGN_OR_RETURN(const CallAnswer answer, client.Await(absl::Now() + absl::Seconds(10)));
    return answer.status;
  };
  absl::StatusOr<RoundTrip> out = MeasureRoundTrips(how.warm_up, how.calls, how.most, call);
  if (restore) sched_setaffinity(0, sizeof before, &before);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return out;
}

}  // namespace tandem::shm
