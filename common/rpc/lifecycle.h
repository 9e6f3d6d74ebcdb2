// Stopping a service: SIGINT and SIGTERM as an event instead of an interruption.
#pragma once

#include <memory>
#include <optional>

#include "absl/time/time.h"

namespace tandem::rpc {

// Blocks SIGINT and SIGTERM in the calling thread, and so in every thread started later, and takes them in a
// thread of its own: make one at the top of main. SIGPIPE is ignored. The first signal is reported, a second
// one ends the process at once with 128 + its number. One object a process; children started with exec
// inherit the blocked signals and must unblock them. Thread-safe.
class StopSignal {
 public:
  StopSignal();
  ~StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  int Wait();                                    // the signal's number, as soon as there was one
  std::optional<int> WaitFor(absl::Duration d);  // nullopt: none so far
  bool Received() const;                         // cheap: for loops that can stop half-way

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::rpc
