// What the measurements share.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/bench/bench.h"
#include "common/kernels/kernels.h"
#include "common/threading/thread_pool.h"

namespace tandem::cli {

class Stopwatch {
 public:
  double Seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Whether another pass is due: after `options.repeat` of them, or, where that is 0, after three and
// `options.seconds`, it is not.
class Passes {
 public:
  explicit Passes(const BenchOptions& options) : repeat_(options.repeat), seconds_(options.seconds) {}
  bool Next() {
    const int64_t done = done_++;
    return repeat_ > 0 ? done < repeat_ : done < 3 || watch_.Seconds() < seconds_;
  }

 private:
  const int64_t repeat_;
  const double seconds_;
  int64_t done_ = 0;
  Stopwatch watch_;
};

// CPUs for `threads` threads (0: one a physical core), physical cores first, over all nodes in turn.
absl::StatusOr<std::vector<int>> BenchCpus(int64_t threads);

// A pool with one thread on each of `cpus`; the calling thread is its first and is pinned, too. Threads spin
// for long: between two passes none goes to sleep.
std::unique_ptr<threading::ThreadPool> PinnedPool(const std::vector<int>& cpus);

// --isa: empty: the active one; "all": every one there is; else the one of that name. InvalidArgument names
// those there are.
absl::StatusOr<std::vector<kernels::Isa>> BenchIsas(const std::string& isa);

// The kernels use `isa` for as long as this lives. One at a time.
class IsaScope {
 public:
  explicit IsaScope(kernels::Isa isa) { kernels::SetActiveIsaForTesting(isa); }
  ~IsaScope() { kernels::SetActiveIsaForTesting(before_); }
  IsaScope(const IsaScope&) = delete;
  IsaScope& operator=(const IsaScope&) = delete;

 private:
  const kernels::Isa before_ = kernels::ActiveIsa();
};

// "1,2,8": numbers from 1 to `most`, rising or not. InvalidArgument names the flag.
absl::StatusOr<std::vector<int64_t>> ParseNumbers(const std::string& flag, const std::string& text,
                                                  int64_t most);

}  // namespace tandem::cli
