// Lists of CPUs in the kernel's notation: "0-7,16,18-19". Thread-safe: pure functions.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::topology {

// The highest CPU number that a list may name, plus one.
inline constexpr int kMaxCpus = 8192;

// In the order of the list (callers pin thread i to the i-th CPU). InvalidArgument quotes the part that is
// wrong: empty parts, anything but digits, ranges that fall, numbers of kMaxCpus and above, CPUs named twice.
// An empty text is an empty list.
absl::StatusOr<std::vector<int>> ParseCpuList(std::string_view text);

// The shortest text that ParseCpuList turns back into the same list in the same order.
std::string FormatCpuList(const std::vector<int>& cpus);

}  // namespace tandem::topology
