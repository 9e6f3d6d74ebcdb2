#include "cli/bench/serve/trace.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

constexpr int64_t kMostTokens = 1 << 30;
constexpr std::string_view kAzureHeading = "TIMESTAMP,ContextTokens,GeneratedTokens";

// Gives out a text's lines and says where an error is.
class Lines {
 public:
  Lines(std::string_view text, std::string name) : rest_(text), name_(std::move(name)) {}

  // The next line that is not empty, without its end; nullopt: there is none.
  std::optional<std::string_view> Next() {
    while (!rest_.empty()) {
      const size_t end = std::min(rest_.find('\n'), rest_.size());
      std::string_view line = rest_.substr(0, end);
      rest_.remove_prefix(std::min(end + 1, rest_.size()));
      ++number_;
      if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
      if (!line.empty()) return line;
    }
    return std::nullopt;
  }
  absl::Status Error(std::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat(name_, ":", number_, ": ", std::string(what)));
  }
  absl::Status Empty() const { return absl::InvalidArgumentError(absl::StrCat(name_, ": no requests")); }

 private:
  std::string_view rest_;
  const std::string name_;
  int64_t number_ = 0;
};

std::optional<int64_t> ParseCount(std::string_view text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  if (number < 1 || number > kMostTokens) return std::nullopt;
  return number;
}

// Azure's "2023-11-16 18:15:46.6805900".
std::optional<absl::Time> ParseTimestamp(std::string_view text) {
  absl::Time time;
  std::string ignored;
  if (!absl::ParseTime("%Y-%m-%d %H:%M:%E*S", std::string(text), absl::UTCTimeZone(), &time, &ignored)) {
    return std::nullopt;
  }
  return time;
}

std::vector<TraceRequest> FromTheirFirst(std::vector<TraceRequest> requests) {
  std::stable_sort(requests.begin(), requests.end(),
                   [](const TraceRequest& a, const TraceRequest& b) { return a.seconds < b.seconds; });
  const double first = requests.front().seconds;
  for (TraceRequest& request : requests) request.seconds -= first;
  return requests;
}

}  // namespace

absl::StatusOr<std::vector<TraceRequest>> ParseMooncake(std::string_view text, const std::string& name) {
  using nlohmann::json;
  Lines lines(text, name);
  std::vector<TraceRequest> requests;
  while (const std::optional<std::string_view> line = lines.Next()) {
    const json entry = json::parse(*line, nullptr, /*allow_exceptions=*/false);
    if (!entry.is_object()) return lines.Error("this is no JSON object");
    TraceRequest request;
    const auto timestamp = entry.find("timestamp");
    if (timestamp == entry.end() || !timestamp->is_number() || !std::isfinite(timestamp->get<double>())) {
      return lines.Error("\"timestamp\" (milliseconds) is missing or no number");
    }
    request.seconds = timestamp->get<double>() / 1000;
    for (const auto& [key, count] : {std::pair{"input_length", &request.prompt_tokens},
                                     std::pair{"output_length", &request.output_tokens}}) {
      const auto it = entry.find(key);
      if (it == entry.end() || !it->is_number_integer() || *it < 1 || *it > kMostTokens) {
        return lines.Error(absl::StrCat("\"", key, "\" is missing or no number from 1 to ", kMostTokens));
      }
      *count = it->get<int64_t>();
    }
    const auto ids = entry.find("hash_ids");
    if (ids == entry.end() || !ids->is_array()) return lines.Error("\"hash_ids\" is missing or no array");
    for (const json& id : *ids) {
      if (!id.is_number_integer()) return lines.Error("\"hash_ids\" holds something that is no whole number");
      request.blocks.push_back(id.get<int64_t>());
    }
    requests.push_back(std::move(request));
  }
  if (requests.empty()) return lines.Empty();
  return FromTheirFirst(std::move(requests));
}

absl::StatusOr<std::vector<TraceRequest>> ParseAzure(std::string_view text, const std::string& name) {
  Lines lines(text, name);
  if (lines.Next() != kAzureHeading) {
    return lines.Error(absl::StrCat("the heading ", std::string(kAzureHeading), " is wanted"));
  }
  std::vector<TraceRequest> requests;
  std::optional<absl::Time> first;
  while (const std::optional<std::string_view> line = lines.Next()) {
    const size_t one = line->find(','), two = line->rfind(',');
    if (one == two || line->find(',', one + 1) != two) return lines.Error("three fields are wanted");
    const std::optional<absl::Time> time = ParseTimestamp(line->substr(0, one));
    if (!time.has_value()) return lines.Error("the first field is no time like 2023-11-16 18:15:46.6805900");
    const std::optional<int64_t> prompt = ParseCount(line->substr(one + 1, two - one - 1));
    const std::optional<int64_t> output = ParseCount(line->substr(two + 1));
    if (!prompt.has_value() || !output.has_value()) {
      return lines.Error(absl::StrCat("tokens are numbers from 1 to ", kMostTokens));
    }
    if (!first.has_value()) first = time;
    TraceRequest request;
    request.seconds = absl::ToDoubleSeconds(*time - *first);
    request.prompt_tokens = *prompt;
    request.output_tokens = *output;
    requests.push_back(std::move(request));
  }
  if (requests.empty()) return lines.Empty();
  return FromTheirFirst(std::move(requests));
}

absl::StatusOr<std::vector<TraceRequest>> ReadTrace(const std::string& path, const std::string& format) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("the trace ", path, " cannot be read"));
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) return absl::DataLossError(absl::StrCat("reading the trace ", path, " fails"));
  const bool mooncake = format == "mooncake" || (format != "azure" && text.starts_with('{'));
  return mooncake ? ParseMooncake(text, path) : ParseAzure(text, path);
}

}  // namespace tandem::cli
