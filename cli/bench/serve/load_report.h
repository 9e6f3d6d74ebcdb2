// The figures of a load, for people and as JSON lines.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cli/bench/serve/load_run.h"

namespace tandem::cli {

// Seconds; zeros where there are no values.
struct Latencies {
  int64_t count = 0;
  double p50 = 0, p90 = 0, p95 = 0, p99 = 0, max = 0;
};
Latencies LatenciesOf(std::vector<double> values);

struct LoadFigures {
  int64_t requests = 0;
  int64_t good = 0;
  std::map<std::string, int64_t> failures;                                     // by kind
  std::map<std::string, std::string> first_details;                            // of each kind
  Latencies first_token, inter_token, mean_inter_token, end_to_end, lateness;  // of good answers
  double seconds = 0;
  // A second, of good answers, over the whole run.
  double requests_rate = 0, prompt_rate = 0, output_rate = 0;
  // Good answers within the limits that were set.
  int64_t within_limits = 0;
  double goodput = 0;  // a second
  // Prompt tokens of good answers: as the server counts, of those cached, and what a cache without bounds
  // would have had.
  int64_t prompt_tokens = 0, cached_tokens = 0, ideal_tokens = 0, output_tokens = 0;
};
LoadFigures FiguresOf(const LoadResults& results, const ServeLoadOptions& options);

// "closed loop of 8", "trace conversation.jsonl at 2 x": what was done, in a few words.
std::string LoadName(const ServeLoadOptions& options);

// A table for people.
std::string LoadTable(const LoadFigures& figures, const LoadResults& results,
                      const ServeLoadOptions& options);
// JSON lines, each ended: a summary and one for every kind of latency.
std::string LoadJson(const LoadFigures& figures, const LoadResults& results, const ServeLoadOptions& options,
                     const std::string& machine);
// One line of --log.
std::string OutcomeJson(const RequestOutcome& outcome);

// Whether everything that was asked for was answered, and rightly.
bool AllWell(const LoadFigures& figures, const LoadResults& results);

}  // namespace tandem::cli
