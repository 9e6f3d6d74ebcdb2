// What a measurement says, as a JSON line or as a row of a table.
#pragma once

#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace tandem::cli {

// A field that does not apply stays empty and is left out of the JSON.
struct Measurement {
  std::string bench;    // "roofline", "moe", "roundtrip", "load"
  std::string machine;  // "AMD EPYC 7542 32-Core Processor, 64 CPUs"
  std::string isa;      // of the kernels
  std::string shape;    // what was measured
  std::optional<int64_t> threads;
  std::optional<int64_t> tokens;       // of one call
  std::optional<double> bytes;         // of one call or pass
  std::optional<double> seconds;       // of the same, median
  std::optional<double> gbps;          // median, 10^9 bytes a second
  std::optional<double> ceiling_gbps;  // median of what was measured in between
  std::optional<double> ratio;         // median of gbps to the ceiling right beside it
  std::optional<double> p50_us;        // of single calls
  std::optional<double> p99_us;
  std::optional<double> tokens_per_second;  // of a whole model, by its number of MoE layers
};

// The measurement as one line of JSON, fields in the order above, without the end of line.
std::string ToJson(const Measurement& m);

// Writes each measurement as soon as it is there: JSON lines, or rows under a heading.
class Report {
 public:
  Report(bool json, std::ostream& out) : json_(json), out_(out) {}
  void Add(const Measurement& m);
  // A line for people; not part of the JSON.
  void Note(const std::string& text);
  // Lines of a measurement that has fields and a table of its own.
  void Raw(const std::string& lines);
  bool json() const { return json_; }

 private:
  const bool json_;
  bool headed_ = false;
  std::ostream& out_;
};

// The model of the CPU and the number of CPUs this process may use; for Measurement::machine.
std::string MachineName();

double Median(std::vector<double> values);  // 0 if there are none
// The smallest value that at least `share` of them do not exceed; 0 if there are none.
double Quantile(std::vector<double> values, double share);
// The same of values in rising order.
double QuantileOfSorted(const std::vector<double>& values, double share);

}  // namespace tandem::cli
