// `tandem inspect FILE`: what a model file holds and where it would go. Reads the header alone.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include "cli/flags/command_line.h"

namespace tandem::cli {

struct InspectOptions {
  std::string file;
  std::string numa = "auto";  // auto or a number of expert processes to plan for
  double vram_gb = 0;         // 0: that of the first GPU, if there is one
  int64_t context = 0;        // 0: the model's
  bool tensors = false;       // list all of them
  bool metadata = false;      // list all keys
  bool json = false;
};

void AddInspectFlags(Command& command, InspectOptions* options);

// The exit code: 0; 1 where the file cannot be read, 2 for bad values of flags. A GGUF file that is no
// deepseek2 model is described as far as it goes, with exit code 1.
int RunInspect(const InspectOptions& options, std::ostream& out, std::ostream& err);

}  // namespace tandem::cli
