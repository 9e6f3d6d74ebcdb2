// `tandem bench roofline | moe | roundtrip | load | serve`: measurements, each beside the ceiling that the
// same run measured in between (ABAB..., medians: a machine's memory bandwidth changes from second to
// second).
//
// This folder links tandem_expert: the measurements are of the library that the expert processes run, without
// a process in between. Elsewhere services are used over their sockets alone.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include "absl/status/status.h"
#include "cli/bench/report.h"
#include "cli/bench/serve/options.h"
#include "cli/flags/command_line.h"

namespace tandem::cli {

struct BenchOptions {
  std::string which;         // roofline, moe, roundtrip, load, serve
  bool json = false;         // JSON lines instead of a table
  std::string isa;           // empty: the one in use; "all": each that this machine has
  int64_t threads = 0;       // 0: one a physical core
  int64_t repeat = 0;        // passes of each measurement; 0: as many as `seconds` takes, three at least
  double seconds = 2;        // for each measurement, about
  std::string shape = "r1";  // moe
  std::string type = "q4_k_m";
  std::string tokens = "1,2,4,8,16,64,512";
  // moe: fast, or bulk (common/kernels/bulk.h)
  std::string precision = "fast";
  int64_t layers = 0;          // distinct ones; 0: by the memory there is
  int64_t experts = 0;         // of each; 0: by the memory there is
  int64_t slices = 1;          // moe: so many processes with a slice each, beside one process with all of it
  int64_t pause_us = 0;        // moe: between calls
  int64_t megabytes = 1024;    // roofline: size of what is read
  int64_t calls = 20000;       // roundtrip
  std::string model;           // load; roundtrip (empty: the demo model)
  std::string expert_program;  // roundtrip: empty: tandem-expert beside this program
  int64_t load_threads = 8;    // load: requests in flight
  ServeLoadOptions serve;
};

void AddBenchFlags(Command& command, BenchOptions* options);

// The exit code: 0; 1 if something cannot be measured, 2 for bad values of flags.
int RunBench(const BenchOptions& options, std::ostream& out, std::ostream& err);

// The measurements. Errors name what is missing, or the flag.
absl::Status BenchRoofline(const BenchOptions& options, Report& report);
absl::Status BenchMoe(const BenchOptions& options, Report& report);
absl::Status BenchRoundtrip(const BenchOptions& options, Report& report);
absl::Status BenchLoad(const BenchOptions& options, Report& report);

}  // namespace tandem::cli
