#include "common/telemetry/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/listen.h"
#include "common/base/status_macros.h"

namespace tandem::telemetry {
namespace {

class CounterImpl final : public Counter {
 public:
  explicit CounterImpl(prometheus::Counter& counter) : counter_(counter) {}
  void Add(double amount) override { counter_.Increment(amount); }

 private:
  prometheus::Counter& counter_;
};

class GaugeImpl final : public Gauge {
 public:
  explicit GaugeImpl(prometheus::Gauge& gauge) : gauge_(gauge) {}
  void Set(double value) override { gauge_.Set(value); }
  void Add(double amount) override { gauge_.Increment(amount); }

 private:
  prometheus::Gauge& gauge_;
};

class HistogramImpl final : public Histogram {
 public:
  explicit HistogramImpl(prometheus::Histogram& histogram) : histogram_(histogram) {}
  void Observe(double value) override { histogram_.Observe(value); }

 private:
  prometheus::Histogram& histogram_;
};

// 1, 2, 5 steps a decade from `first` to `last`.
std::vector<double> Steps(double first, double last) {
  std::vector<double> out;
  for (double decade = first; decade <= last * 1.001; decade *= 10) {
    for (const double step : {1.0, 2.0, 5.0}) {
      if (decade * step <= last * 1.001) out.push_back(decade * step);
    }
  }
  return out;
}

// The HTTP server looks whether it is to stop only every two seconds or when a client comes. So be one.
void StopQuickly(std::unique_ptr<prometheus::Exposer> exposer, const HostPort& at) {
  std::atomic<bool> stopped{false};
  std::thread visitor([&] {
    while (!stopped) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      TouchTcp(at);
    }
  });
  exposer.reset();
  stopped = true;
  visitor.join();
}

}  // namespace

std::vector<double> MicrosecondBuckets() { return Steps(1e-6, 1); }

std::vector<double> RequestBuckets() {
  std::vector<double> out = Steps(1e-3, 100);
  for (const double more : {200.0, 300.0, 600.0}) out.push_back(more);
  return out;
}

struct Metrics::Impl {
  explicit Impl(std::string service_name) : constant{{"service", std::move(service_name)}} {}

  const Labels constant;
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  using Key = std::pair<std::string, Labels>;
  std::mutex mutex;
  std::map<Key, std::unique_ptr<Counter>> counters;
  std::map<Key, std::unique_ptr<Gauge>> gauges;
  std::map<Key, std::unique_ptr<Histogram>> histograms;
  std::unique_ptr<prometheus::Exposer> exposer;
  HostPort exposed_at;

  // The one object of a name and labels, made by `make` at the first call.
  template <typename T, typename Make>
  T& Once(std::map<Key, std::unique_ptr<T>>& of, const std::string& name, const Labels& labels,
          const Make& make) {
    const std::lock_guard lock(mutex);
    std::unique_ptr<T>& slot = of[Key(name, labels)];
    if (slot == nullptr) slot = make();
    return *slot;
  }
};

Metrics::Metrics(std::string service) : impl_(std::make_unique<Impl>(std::move(service))) {
  AddGauge("tandem_build_info", "Always 1; the version of the program is a label.",
           {{"version", TANDEM_VERSION}})
      .Set(1);
}

Metrics::~Metrics() {
  if (impl_->exposer != nullptr) StopQuickly(std::move(impl_->exposer), impl_->exposed_at);
}

Counter& Metrics::AddCounter(const std::string& name, const std::string& help, const Labels& labels) {
  // The naming rule of Prometheus that is easiest to forget.
  TANDEM_CHECK(name.size() > 6 && name.substr(name.size() - 6) == "_total" && !help.empty());
  return impl_->Once(impl_->counters, name, labels, [&] {
    auto& family =
        prometheus::BuildCounter().Name(name).Help(help).Labels(impl_->constant).Register(*impl_->registry);
    return std::make_unique<CounterImpl>(family.Add(labels));
  });
}

Gauge& Metrics::AddGauge(const std::string& name, const std::string& help, const Labels& labels) {
  TANDEM_CHECK(!help.empty());
  return impl_->Once(impl_->gauges, name, labels, [&] {
    auto& family =
        prometheus::BuildGauge().Name(name).Help(help).Labels(impl_->constant).Register(*impl_->registry);
    return std::make_unique<GaugeImpl>(family.Add(labels));
  });
}

Histogram& Metrics::AddHistogram(const std::string& name, const std::string& help,
                                 const std::vector<double>& buckets, const Labels& labels) {
  TANDEM_CHECK(!help.empty() && !buckets.empty());
  return impl_->Once(impl_->histograms, name, labels, [&] {
    auto& family =
        prometheus::BuildHistogram().Name(name).Help(help).Labels(impl_->constant).Register(*impl_->registry);
    return std::make_unique<HistogramImpl>(family.Add(labels, buckets));
  });
}

std::string Metrics::Expose() const {
  return prometheus::TextSerializer().Serialize(impl_->registry->Collect());
}

absl::StatusOr<int> Metrics::Serve(const std::string& address) {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->exposer != nullptr) return absl::FailedPreconditionError("metrics are served already");
  TANDEM_RETURN_IF_ERROR(Annotate(ProbeListen(address), "metrics"));
  // The HTTP server takes numbers only; a name's first address is enough for it.
  TANDEM_ASSIGN_OR_RETURN(const std::vector<HostPort> at, ResolveListen(address));
  if (at.empty()) return absl::NotFoundError(absl::StrCat("metrics: nothing to listen at for ", address));
  try {
    auto exposer = std::make_unique<prometheus::Exposer>(std::vector<std::string>{
        "listening_ports", at.front().ToString(), "num_threads", "4", "request_timeout_ms", "10000"});
    exposer->RegisterCollectable(impl_->registry);
    const std::vector<int> ports = exposer->GetListeningPorts();
    if (ports.empty()) return absl::InternalError(absl::StrCat("metrics: no port bound for ", address));
    impl_->exposer = std::move(exposer);
    impl_->exposed_at = at.front();
    impl_->exposed_at.port = ports.front();
    return ports.front();
  } catch (const std::exception& e) {
    return absl::UnavailableError(absl::StrCat("metrics: cannot listen at ", address, ": ", e.what()));
  }
}

}  // namespace tandem::telemetry
