// Where every program takes its flags from, and in which order: the command line, then the environment
// (TANDEM_<FLAG>), then the file of --config (or TANDEM_CONFIG).
#pragma once

#include <string>
#include <string_view>

namespace CLI {
class App;
}

namespace tandem::flags {

// "max-batch-size": "TANDEM_MAX_BATCH_SIZE".
std::string EnvironmentName(std::string_view flag);

// To be called when `app` has all its flags: adds --config and reads what is not on the command line from the
// environment and, what is not there either, from the file: lines `flag = value`, `#` comments, lists as
// `flag = ["a", "b"]`. A flag in the file that does not exist is an error, and so is a missing file. Empty
// variables count as not set. For programs without subcommands; `app` must outlive its parse.
void AddEnvironmentAndFile(CLI::App& app);

}  // namespace tandem::flags
