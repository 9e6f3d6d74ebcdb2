#include "common/topology/cpu_list.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <set>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace tandem::topology {
namespace {

std::optional<int> ParseNumber(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  if (text.front() == '-' || value >= kMaxCpus) return std::nullopt;
  return value;
}

}  // namespace

absl::StatusOr<std::vector<int>> ParseCpuList(std::string_view text) {
  std::vector<int> cpus;
  if (text.empty()) return cpus;
  std::set<int> seen;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    const std::string_view part = text.substr(begin, comma - begin);
    begin = comma + 1;
    const size_t dash = part.find('-');
    const std::optional<int> first = ParseNumber(part.substr(0, dash));
    const std::optional<int> last =
        dash == std::string_view::npos ? first : ParseNumber(part.substr(dash + 1));
    if (!first || !last || *last < *first) {
      return absl::InvalidArgumentError(absl::StrCat("CPU list \"", std::string(text), "\": \"",
                                                     std::string(part), "\" is neither a number below ",
                                                     kMaxCpus, " nor a rising range such as 0-7"));
    }
    for (int cpu = *first; cpu <= *last; ++cpu) {
      if (!seen.insert(cpu).second) {
        return absl::InvalidArgumentError(
            absl::StrCat("CPU list \"", std::string(text), "\": CPU ", cpu, " is named twice"));
      }
      cpus.push_back(cpu);
    }
  }
  return cpus;
}

std::string FormatCpuList(const std::vector<int>& cpus) {
  std::string text;
  for (size_t i = 0; i < cpus.size();) {
    size_t end = i + 1;
    while (end < cpus.size() && cpus[end] == cpus[end - 1] + 1) ++end;
    absl::StrAppend(&text, text.empty() ? "" : ",", cpus[i]);
    if (end - i > 1) absl::StrAppend(&text, end - i == 2 ? "," : "-", cpus[end - 1]);
    i = end;
  }
  return text;
}

}  // namespace tandem::topology
