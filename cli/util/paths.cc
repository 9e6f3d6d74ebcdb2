#include "cli/util/paths.h"

#include <cstdlib>
#include <filesystem>

#include "absl/strings/str_cat.h"

namespace tandem::cli {

std::string ProgramFolder() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? std::string(".") : self.parent_path().string();
}

absl::StatusOr<std::string> FindDemoModel() {
  const char* folder = std::getenv("TANDEM_MODEL_DIR");
  const std::filesystem::path place =
      folder != nullptr && *folder != '\0'
          ? std::filesystem::path(folder)
          : std::filesystem::path(ProgramFolder()) / ".." / "share" / "tandem";
  const std::filesystem::path file = (place / kDemoModel).lexically_normal();
  std::error_code error;
  if (std::filesystem::is_regular_file(file, error)) return file.string();
  return absl::NotFoundError(absl::StrCat("no --model given, and the demo model is not at ", file.string(),
                                          " (TANDEM_MODEL_DIR names its folder)"));
}

}  // namespace tandem::cli
