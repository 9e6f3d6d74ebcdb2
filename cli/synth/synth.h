// `tandem synth OUT.gguf`: a deepseek2 model with the dimensions and weight types of a real one and random
// weights, for measurements and tests.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/flags/command_line.h"
#include "cli/synth/plan.h"

namespace tandem::cli {

struct SynthOptions {
  std::string out;
  std::string shape = "r1";
  std::string type = "q4_k_m";
  std::string layout = "mla";  // or legacy
  int64_t moe_layers = -1;     // -1: the shape's
  int64_t dense_layers = -1;
  int64_t experts = -1;
  int64_t alias_layers = 0;  // 0: none
  int64_t seed = 1;
  int64_t threads = 0;         // 0: one a core
  std::string split_max_size;  // "40G"; empty: one file
  bool force = false;          // overwrite
};

void AddSynthFlags(Command& command, SynthOptions* options);

// The exit code: 0; 1 if the file cannot be written, 2 for bad values of flags, 128 + its number after SIGINT
// or SIGTERM, which it takes while it runs. Progress goes to `err`. Unless it is 0, nothing is left on the
// disk.
int RunSynth(const SynthOptions& options, std::ostream& out, std::ostream& err);

// What RunSynth writes, before it is written. InvalidArgument names the flag.
absl::StatusOr<SynthPlan> PlanSynth(const SynthOptions& options);

// Called with the bytes that are there, of plan.bytes.
using SynthProgress = std::function<void(uint64_t bytes)>;
// Writes the plan's files and returns their names, in order. The same plan, seed and split give the same
// bytes, whatever the number of threads. ResourceExhausted: the disk has no room (said before anything is
// written); AlreadyExists; Cancelled: `cancelled`, which may be empty, said so. No file is left after an
// error.
absl::StatusOr<std::vector<std::string>> WriteSynth(const SynthPlan& plan, const SynthOptions& options,
                                                    const SynthProgress& progress,
                                                    const std::function<bool()>& cancelled = {});

}  // namespace tandem::cli
