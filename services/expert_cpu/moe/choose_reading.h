// Which way of reading weights (common/kernels/reading.h) is fastest here, by trying: what is known of a
// processor's kind was wrong by half of the bandwidth once.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/kernels/reading.h"
#include "services/expert_cpu/moe/moe.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::expert {

struct TriedReading {
  kernels::ReadingWay way = kernels::ReadingWay::kPanels;
  double seconds = 0;  // the median
  double ratio = 1;    // the median of what it took of the first way's time in the same round
};

// Times every way once a round, in turns, `first` first, until `rounds` are done or `most` has passed; at
// least one. In rising order of the ratios, but `first` leads if it is less than 5 % behind: memory shared
// with others is not the same from one moment to the next. Errors are those of `time`, which returns seconds.
absl::StatusOr<std::vector<TriedReading>> TryReadings(
    kernels::ReadingWay first, int rounds, absl::Duration most,
    const std::function<absl::StatusOr<double>(kernels::ReadingWay)>& time);

struct ChooseReadingOptions {
  uint64_t least_bytes =
      1'000'000'000;  // of the shard; a smaller one may lie in the caches, and is not tried
  int rounds = 25;
  absl::Duration most = absl::Milliseconds(1500);
};

// Calls `moe`, which nobody else may do meanwhile, with one token and with four that share their experts,
// each time others, and makes the way whose two calls are fastest together that of this process's products.
// What came of it, for the log: "panels (14.1 ms; rows 17.0, ...)", or the default's name and why nothing was
// tried.
absl::StatusOr<std::string> ChooseReading(const Shard& shard, Moe& moe, const ChooseReadingOptions& options);

}  // namespace tandem::expert
