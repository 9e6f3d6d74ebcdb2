// The file of --config: lines `flag = value`, `#` comments, sections `[serve]` for one command. Flags as on
// the command line, without dashes in front; a list is the flag again on the next line. Values may stand in
// double or single quotes; a UTF-8 byte order mark in front of everything is skipped.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::cli {

struct ConfigEntry {
  std::string section;  // empty: for every command that has the flag
  std::string key;      // underscores turned to dashes
  std::string value;
  int line = 0;  // 1-based
};

// InvalidArgument "FILE:LINE: ..." for a line that is none of these, for files above 1 MB and for bytes of
// zero. NotFound if it cannot be opened.
absl::StatusOr<std::vector<ConfigEntry>> ReadConfigFile(const std::string& path);

}  // namespace tandem::cli
