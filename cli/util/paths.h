// Where the installation lies, seen from the running program.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace tandem::cli {

inline constexpr char kDemoModel[] = "tinyr1-Q4_K_M.gguf";

// The folder of the running executable.
std::string ProgramFolder();

// The bundled demo model: $TANDEM_MODEL_DIR/NAME if that is set, else PROGRAM_FOLDER/../share/tandem/NAME.
// NotFound names the places.
absl::StatusOr<std::string> FindDemoModel();

}  // namespace tandem::cli
