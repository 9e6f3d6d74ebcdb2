// `tandem plan`: how fast a machine would run a model, and what would lie where, before anything is bought,
// downloaded or loaded. The arithmetic is in predict.h; docs/plan.md sets it beside measurements.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include "absl/status/statusor.h"
#include "cli/flags/command_line.h"
#include "cli/plan/model_bytes.h"
#include "cli/plan/predict.h"
#include "cli/synth/synth.h"

namespace tandem::cli {

struct PlanOptions {
  std::string model;     // a file; empty: `synth`'s shape
  SynthOptions synth;    // its shape, type, layers and experts
  bool measure = false;  // read bandwidth and sockets of this machine
  bool gpu = true;
  // Negative: MachineFigures' own, those of the reference box.
  int64_t sockets = -1;
  double dram_gbps = -1, cpu_efficiency = -1, cpu_tmacs = -1, cpu_prefill = -1;
  double vram_gb = -1, vram_gbps = -1, gpu_efficiency = -1, gpu_tflops = -1, gpu_compute_efficiency = -1;
  double pcie_gbps = -1, round_trip_us = -1;
  int64_t context = 0;  // tokens of the KV cache; 0: model::DefaultContext
  std::string kv_type = "bf16";
  std::string requests = "1,4,8,16,64";
  std::string contexts = "1024,8192,32768,131072";
  std::string prompts = "512,4096,16384,65536";
  PrefillOptions prefill;
  bool json = false;
};

void AddPlanFlags(Command& command, PlanOptions* options);

// The exit code: 0; 1 where the file cannot be read or nothing measured, 2 for bad values of flags.
int RunPlan(const PlanOptions& options, std::ostream& out, std::ostream& err);

// What plain reads by all threads of each NUMA node reach here, summed and divided by the sockets; each node
// reads memory of its own. ResourceExhausted: not enough memory.
struct MeasuredReads {
  int sockets = 1;
  double dram_gbps = 0;  // of a socket
};
absl::StatusOr<MeasuredReads> MeasureReads();

}  // namespace tandem::cli
