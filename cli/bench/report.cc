#include "cli/bench/report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <ostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/topology/topology.h"

namespace tandem::cli {

std::string ToJson(const Measurement& m) {
  nlohmann::ordered_json line;
  line["bench"] = m.bench;
  line["machine"] = m.machine;
  const auto put = [&line](const char* name, const auto& value) {
    if (value) line[name] = *value;
  };
  if (!m.isa.empty()) line["isa"] = m.isa;
  put("threads", m.threads);
  if (!m.shape.empty()) line["shape"] = m.shape;
  put("tokens", m.tokens);
  put("bytes", m.bytes);
  put("seconds", m.seconds);
  put("gbps", m.gbps);
  put("ceiling_gbps", m.ceiling_gbps);
  put("ratio", m.ratio);
  put("p50_us", m.p50_us);
  put("p99_us", m.p99_us);
  put("tokens_per_second", m.tokens_per_second);
  return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

void Report::Add(const Measurement& m) {
  if (json_) {
    out_ << ToJson(m) << "\n" << std::flush;
    return;
  }
  if (!headed_) {
    out_ << absl::StrFormat("%-44s %-12s %7s %6s %10s %8s %8s %6s %10s %10s %9s\n", "what", "isa", "threads",
                            "tokens", "MB", "GB/s", "ceiling", "ratio", "p50 us", "p99 us", "tokens/s");
    headed_ = true;
  }
  const auto whole = [](const std::optional<int64_t>& v) { return v ? absl::StrCat(*v) : std::string("-"); };
  const auto real = [](const std::optional<double>& v, int digits, double scale = 1) {
    return v ? absl::StrFormat("%.*f", digits, *v * scale) : std::string("-");
  };
  out_ << absl::StrFormat("%-44s %-12s %7s %6s %10s %8s %8s %6s %10s %10s %9s\n", m.bench + " " + m.shape,
                          m.isa.empty() ? "-" : m.isa, whole(m.threads), whole(m.tokens),
                          real(m.bytes, 1, 1e-6), real(m.gbps, 2), real(m.ceiling_gbps, 2), real(m.ratio, 3),
                          real(m.p50_us, 1), real(m.p99_us, 1), real(m.tokens_per_second, 2))
       << std::flush;
}

void Report::Note(const std::string& text) {
  if (!json_) out_ << text << "\n" << std::flush;
}

void Report::Raw(const std::string& lines) { out_ << lines << std::flush; }

std::string MachineName() {
  const auto topology = topology::Topology::Detect();
  if (!topology.ok()) return "unknown";
  const std::string model = topology->cpu_model().empty() ? "unknown CPU" : topology->cpu_model();
  return absl::StrCat(model, ", ", topology->cpus(), " CPUs");
}

double Quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return QuantileOfSorted(values, share);
}

double QuantileOfSorted(const std::vector<double>& values, double share) {
  if (values.empty()) return 0;
  const auto rank = static_cast<int64_t>(std::ceil(share * static_cast<double>(values.size()))) - 1;
  return values[static_cast<size_t>(std::clamp<int64_t>(rank, 0, static_cast<int64_t>(values.size()) - 1))];
}

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  const size_t half = values.size() / 2;
  std::sort(values.begin(), values.end());
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

}  // namespace tandem::cli
