#include "cli/flags/config_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string_view>

#include "absl/strings/str_cat.h"

namespace tandem::cli {
namespace {

constexpr size_t kMaxBytes = 1 << 20;

std::string Trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return "";
  return std::string(text.substr(begin, text.find_last_not_of(kSpace) - begin + 1));
}

// The value with its comment and quotes taken off; false if the quotes do not close.
bool Unquote(std::string& value) {
  if (value.empty() || (value.front() != '"' && value.front() != '\'')) {
    value = Trim(value.substr(0, std::min(value.find(" #"), value.size())));
    return true;
  }
  const size_t close = value.find(value.front(), 1);
  if (close == std::string::npos) return false;
  const std::string rest = Trim(value.substr(close + 1));
  if (!rest.empty() && rest.front() != '#') return false;
  value = value.substr(1, close - 1);
  return true;
}

}  // namespace

absl::StatusOr<std::vector<ConfigEntry>> ReadConfigFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    return absl::NotFoundError(
        absl::StrCat("cannot open the config file ", path, ": ", std::strerror(errno)));
  std::string text(kMaxBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (file.bad() || (text.empty() && !file.eof())) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read the config file ", path));
  }
  if (text.size() > kMaxBytes || text.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " is not a config file: longer than 1 MB or not text"));
  }
  constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";  // Windows editors write one
  if (text.starts_with(kByteOrderMark)) text.erase(0, kByteOrderMark.size());
  std::vector<ConfigEntry> entries;
  std::istringstream lines(text);
  std::string raw, section;
  for (int number = 1; std::getline(lines, raw); ++number) {
    const std::string line = Trim(raw);
    const auto error = [&](const std::string& what) {
      return absl::InvalidArgumentError(absl::StrCat(path, ":", number, ": ", what));
    };
    if (line.empty() || line.front() == '#') continue;
    if (line.front() == '[') {
      const size_t close = line.find(']');
      if (close == std::string::npos) return error("a section is written [name]");
      section = Trim(std::string_view(line).substr(1, close - 1));
      continue;
    }
    const size_t equals = line.find('=');
    if (equals == std::string::npos) return error("expected \"flag = value\"");
    ConfigEntry entry{section, Trim(std::string_view(line).substr(0, equals)),
                      Trim(std::string_view(line).substr(equals + 1)), number};
    std::replace(entry.key.begin(), entry.key.end(), '_', '-');
    if (entry.key.empty()) return error("expected a flag in front of \"=\"");
    if (!Unquote(entry.value)) return error("the quotes do not close");
    entries.push_back(std::move(entry));
  }
  return entries;
}

}  // namespace tandem::cli
