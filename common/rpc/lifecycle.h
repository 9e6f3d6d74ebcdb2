// Stopping a service: SIGINT and SIGTERM as an event instead of an interruption.
#pragma once

#include <memory>
#include <optional>

#include "absl/time/time.h"

namespace tandem::rpc {

// For the top of main, before anything is opened: standard input and output that are closed become /dev/null
// (else the next file or socket would have their numbers, and get what is printed), and as many files may be
// open as the system allows without asking it for more (the usual 1024 are few for a server's connections).
void PrepareProcess();

// Blocks SIGINT and SIGTERM in the calling thread, and so in every thread started later, and takes them in a
// thread of its own: make one at the top of main. SIGPIPE is ignored. The first signal is reported, a second
// one ends the process at once with 128 + its number, but for a SIGTERM within two seconds of another: who
// stops a whole group (systemd, a container) reaches the process as well as its supervisor, which passes the
// stop on. One object a process; children started with exec inherit the blocked signals and must unblock
// them. Thread-safe.
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
