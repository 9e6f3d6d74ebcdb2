// `tandem doctor`: is this machine set up well, and what to change.
#pragma once

#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include "cli/flags/command_line.h"
#include "common/topology/gpu.h"
#include "common/topology/limits.h"
#include "common/topology/topology.h"

namespace tandem::cli {

struct DoctorOptions {
  std::string model;  // empty: only the machine
};

void AddDoctorFlags(Command& command, DoctorOptions* options);

// What the checks look at.
struct Machine {
  const topology::Topology* topology = nullptr;
  topology::MemoryInfo memory;
  topology::HugePages huge_pages;
  topology::GpuReport gpus;
  topology::ResourceLimit memlock;
  topology::ResourceLimit open_files;
  std::optional<int> swappiness;
  uint64_t swap_bytes = 0;
  std::string isa;            // of the kernels: "scalar", "avx2", ...
  uint64_t expert_bytes = 0;  // routed experts of the model in question; 0: none in question
};

struct Finding {
  enum class Level { kOk, kChange, kWrong };  // kChange: works, could be better; kWrong: will not work
  Level level = Level::kOk;
  std::string topic;  // "huge pages"
  std::string text;
  std::string advice;  // for what is not OK: the command or the setting
};

std::vector<Finding> Examine(const Machine& machine);

// The exit code: 1 if something is wrong (also: the model cannot be opened or does not fit), else 0.
int RunDoctor(const DoctorOptions& options, std::ostream& out);

}  // namespace tandem::cli
