// One load against one server: sends the requests when they are due, takes the answers down.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/bench/serve/idle_crowd.h"
#include "cli/bench/serve/options.h"
#include "cli/bench/serve/server_facts.h"
#include "cli/bench/serve/streamed_answer.h"
#include "cli/bench/serve/workload.h"

namespace tandem::cli {

// Times are seconds; those of a request count from the moment it was due, in an open loop also if it was sent
// later: a generator that waits for a slow server must not make it look fast.
struct RequestOutcome {
  int64_t index = 0;
  double due = 0;       // since the beginning
  double lateness = 0;  // from there until it was sent
  double first = 0;     // until the first text
  double end = 0;       // until the answer was whole
  double mean_gap = 0;  // between tokens: from the first text to the last by the tokens but one; 0: one token
  std::string failure;  // kind; empty: a good answer
  std::string detail;
  int64_t asked_prompt = 0;  // as planned, about where prompts are text
  int64_t asked_output = 0;
  int64_t ideal_cached = 0;   // of asked_prompt, by a cache without bounds
  int64_t prompt_tokens = 0;  // as the server counts
  int64_t cached_tokens = 0;
  int64_t completion_tokens = 0;
};

struct VerifyCounts {
  int64_t repeated = 0;  // greedy answers to a prompt that was asked before
  int64_t repeated_differing = 0;
  int64_t again = 0;  // asked again, alone
  int64_t again_differing = 0;
  std::string first_difference;
};

struct LoadResults {
  std::vector<RequestOutcome> outcomes;  // as they ended
  std::vector<double> gaps;              // between pieces of text of good answers
  double seconds = 0;                    // from the first due moment to the last end
  int64_t most_under_way = 0;
  int64_t connections = 0;  // opened for requests
  IdleCrowd::Counts idle;
  VerifyCounts verify;
  bool interrupted = false;
};

struct LoadPlan {
  Url url;
  ServeLoadOptions options;
  ServerFacts facts;
};

// Runs until all answers are there; a first SIGINT ends it early. Unavailable: the server cannot be reached.
absl::StatusOr<LoadResults> RunLoad(const LoadPlan& plan, Workload workload);

}  // namespace tandem::cli
