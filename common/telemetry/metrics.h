// Prometheus metrics of a process. Names and units: DESIGN.md / docs/architecture.md, base units (seconds,
// bytes, ratios). Thread-safe; observing never blocks on the network.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::telemetry {

using Labels = std::map<std::string, std::string>;

class Counter {
 public:
  virtual ~Counter() = default;
  virtual void Add(double amount = 1) = 0;
};
class Gauge {
 public:
  virtual ~Gauge() = default;
  virtual void Set(double value) = 0;
  virtual void Add(double amount) = 0;
};
class Histogram {
 public:
  virtual ~Histogram() = default;
  virtual void Observe(double value) = 0;
};

// Bucket bounds for durations from 1 us to 100 s and for latencies of requests.
std::vector<double> MicrosecondBuckets();  // 1e-6 ... 1
std::vector<double> RequestBuckets();      // 1e-3 ... 600

class Metrics {
 public:
  // `service` becomes the label service="gateway" of every series.
  explicit Metrics(std::string service);
  ~Metrics();

  // The same name and labels give the same object; it lives as long as the Metrics.
  Counter& AddCounter(const std::string& name, const std::string& help, const Labels& labels = {});
  Gauge& AddGauge(const std::string& name, const std::string& help, const Labels& labels = {});
  Histogram& AddHistogram(const std::string& name, const std::string& help,
                          const std::vector<double>& buckets, const Labels& labels = {});

  // Text exposition format 0.0.4, as GET /metrics answers.
  std::string Expose() const;

  // Serves GET /metrics on "host:port" (port 0: a free one, see the result) until destruction.
  absl::StatusOr<int> Serve(const std::string& address);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::telemetry
