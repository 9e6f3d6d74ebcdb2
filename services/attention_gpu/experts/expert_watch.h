// Looks after the expert processes from the side: a loss must show while nothing is computed, too, when no
// call would run into it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/rpc/server.h"

namespace tandem::attention {

// One thread for each process asks its gRPC health again and again, over a channel of its own. Thread-safe.
class ExpertWatch {
 public:
  struct Options {
    std::vector<std::string> addresses;
    rpc::TlsOptions tls;
    absl::Duration period = absl::Seconds(1);        // between checks of a process that serves
    absl::Duration check = absl::Milliseconds(500);  // one check waits so long for SERVING
    int misses = 4;                                  // checks in a row that make a loss
    std::function<void()> on_change = [] {};         // lost() says something else; on a thread of the watch
  };
  // All count as serving at first: they were attached a moment ago. InvalidArgument: an address that is none.
  static absl::StatusOr<std::unique_ptr<ExpertWatch>> Start(Options options);
  ~ExpertWatch();  // waits for the checks under way; on_change is not called afterwards

  // Each process that is lost, and the last answer of its health; empty: all serve.
  std::string lost() const;

 private:
  struct Impl;
  explicit ExpertWatch(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::attention
