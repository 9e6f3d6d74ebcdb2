// Which requests a load consists of: lengths, contents and, for an open loop, arrivals. All of it follows
// from the options and the seed alone.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/bench/serve/trace.h"

namespace tandem::cli {

// Prompts are made of units, each a number below `alphabet`: tokens where the server takes token ids, else
// words, of which `tokens_per_unit` says how many tokens they have on average.
struct WorkloadOptions {
  uint64_t seed = 1;
  int64_t alphabet = 1;             // > 0
  double tokens_per_unit = 1;       // > 0
  double overhead_tokens = 0;       // of every prompt, whatever is in it (chat template)
  std::vector<TraceRequest> trace;  // empty: made up from what follows
  double trace_speed = 1;
  double length_scale = 1;  // of the trace's lengths
  int64_t max_context = 0;  // prompt and output fit this; 0: no bound
  int64_t prompt_tokens = 128;
  int64_t output_tokens = 64;
  int64_t shared_prefix = 0;     // the first tokens of prompt_tokens that all have in common
  int64_t distinct_prompts = 0;  // so many different ones, in turn; 0: all differ
  double rate = 0;               // arrivals a second (Poisson); 0: as the trace says
};

struct PlannedRequest {
  double arrival = 0;  // seconds since the beginning
  int64_t output_tokens = 0;
  std::vector<int32_t> prompt;  // units
};

// Not thread-safe.
class Workload {
 public:
  // InvalidArgument: what is asked for leaves no room for a prompt.
  static absl::StatusOr<Workload> Create(WorkloadOptions options);

  // The next request; nullopt: the trace has no more. Arrivals never go down.
  std::optional<PlannedRequest> Next();
  // Requests there are in all; nullopt: as many as are wanted.
  std::optional<int64_t> size() const;

 private:
  explicit Workload(WorkloadOptions options) : options_(std::move(options)) {}
  // Appends units of the sequence `stream` up to `length` in all.
  void Extend(uint64_t stream, int64_t length, std::vector<int32_t>* prompt) const;
  int64_t Units(double tokens) const;

  WorkloadOptions options_;
  int64_t next_ = 0;
  double clock_ = 0;  // arrival of the latest, for a Poisson process
};

}  // namespace tandem::cli
