#include "cli/bench/util.h"

#include <charconv>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/topology/topology.h"

namespace tandem::cli {

absl::StatusOr<std::vector<int>> BenchCpus(int64_t threads) {
  TANDEM_ASSIGN_OR_RETURN(const topology::Topology topology, topology::Topology::Detect());
  TANDEM_ASSIGN_OR_RETURN(const std::vector<topology::ThreadPlan> plans,
                          topology.PlanThreads(static_cast<int>(threads)));
  std::vector<int> cpus;
  for (const topology::ThreadPlan& plan : plans) {
    for (int i = 0; i < plan.threads; ++i)
      cpus.push_back(plan.cpus[static_cast<size_t>(i) % plan.cpus.size()]);
  }
  return cpus;
}

std::unique_ptr<threading::ThreadPool> PinnedPool(const std::vector<int>& cpus) {
  threading::ThreadPool::Options options;
  options.threads = static_cast<int>(cpus.size());
  options.cpus = cpus;
  options.spin_microseconds = 1000;
  options.name = "tandem-b";
  threading::PinCurrentThread(cpus.front());  // where it is refused, the workers say so
  return std::make_unique<threading::ThreadPool>(options);
}

absl::StatusOr<std::vector<kernels::Isa>> BenchIsas(const std::string& isa) {
  const std::vector<kernels::Isa> available = kernels::AvailableIsas();
  if (isa.empty()) return std::vector<kernels::Isa>{kernels::ActiveIsa()};
  if (isa == "all") return available;
  std::string names;
  for (const kernels::Isa each : available) {
    if (isa == kernels::IsaName(each)) return std::vector<kernels::Isa>{each};
    absl::StrAppend(&names, names.empty() ? "" : ", ", std::string(kernels::IsaName(each)));
  }
  return absl::InvalidArgumentError(absl::StrCat("--isa ", isa, ": this machine has ", names, "; or all"));
}

absl::StatusOr<std::vector<int64_t>> ParseNumbers(const std::string& flag, const std::string& text,
                                                  int64_t most) {
  std::vector<int64_t> numbers;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at < end) {
    int64_t number = 0;
    const auto [stop, error] = std::from_chars(at, end, number);
    const bool comma = stop < end && *stop == ',' && stop + 1 < end;
    if (error != std::errc() || number < 1 || number > most || !(stop == end || comma)) {
      numbers.clear();
      break;
    }
    numbers.push_back(number);
    at = comma ? stop + 1 : stop;
  }
  if (numbers.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--", flag, " ", text, ": numbers from 1 to ", most, " with commas between are wanted"));
  }
  return numbers;
}

}  // namespace tandem::cli
