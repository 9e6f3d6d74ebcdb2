#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/bench/report.h"
#include "cli/bench/util.h"
#include "cli/plan/plan.h"
#include "common/base/status_macros.h"
#include "common/kernels/read_ceiling.h"
#include "common/topology/limits.h"
#include "common/topology/topology.h"
#include "services/expert_cpu/shard/arena.h"

namespace tandem::cli {
namespace {

constexpr uint64_t kNodeBytes = 1'000'000'000;  // read on each node: far more than its caches
constexpr int kPasses = 7;

}  // namespace

absl::StatusOr<MeasuredReads> MeasureReads() {
  TANDEM_ASSIGN_OR_RETURN(const topology::Topology topology, topology::Topology::Detect());
  TANDEM_ASSIGN_OR_RETURN(const std::vector<topology::ThreadPlan> plans, topology.PlanThreads(0));
  const uint64_t usable = topology::ReadMemoryInfo().UsableBytes();
  if (kNodeBytes > usable / 10 * 9) {
    return absl::ResourceExhaustedError(absl::StrCat("--measure reads ", kNodeBytes / 1'000'000, " MB, ",
                                                     usable / 1'000'000, " MB are available"));
  }
  MeasuredReads out;
  out.sockets = std::max(1, topology.sockets());
  for (const topology::ThreadPlan& plan : plans) {
    TANDEM_ASSIGN_OR_RETURN(const expert::Arena arena, expert::Arena::Allocate(kNodeBytes));
    // Where it is refused, the first touch by the node's own threads does the same.
    topology.BindMemory(arena.data(), arena.bytes(), plan.node).IgnoreError();
    const auto pool = PinnedPool(plan.cpus);
    const auto bytes = static_cast<int64_t>(arena.bytes());
    constexpr int64_t kGrain = 1 << 20;
    pool->ParallelFor((bytes + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end, int) {
      const int64_t first = begin * kGrain, last = std::min(bytes, end * kGrain);
      std::memset(arena.data() + first, 0x5a, static_cast<size_t>(last - first));
    });
    std::vector<double> gbps;
    for (int i = 0; i < kPasses; ++i) {
      gbps.push_back(kernels::MeasureReadBandwidth(*pool, arena.data(), bytes) / 1e9);
    }
    out.dram_gbps += Median(gbps) / out.sockets;
  }
  return out;
}

}  // namespace tandem::cli
