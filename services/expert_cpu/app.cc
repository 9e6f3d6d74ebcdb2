#include "services/expert_cpu/app.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"
#include "common/kernels/read_ceiling.h"
#include "common/rpc/lifecycle.h"
#include "common/rpc/server.h"
#include "common/telemetry/log.h"
#include "common/telemetry/metrics.h"
#include "common/threading/thread_pool.h"
#include "common/topology/cpu_list.h"
#include "common/topology/topology.h"
#include "services/expert_cpu/moe/choose_reading.h"
#include "services/expert_cpu/moe/moe.h"
#include "services/expert_cpu/service.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::expert {
namespace {

constexpr absl::Duration kDrainPatience = absl::Seconds(35);  // a little more than engines give their streams
constexpr absl::Duration kQuiet = absl::Seconds(1);           // without a call
constexpr absl::Duration kShutdownPatience = absl::Seconds(10);

// Where threads and memory are to be.
struct Placement {
  std::optional<topology::Topology> topology;
  int node = -1;
  int threads = 0;
  std::vector<int> cpus;
};

absl::StatusOr<Placement> Place(const Options& options) {
  Placement out;
  out.node = options.numa_node;
  topology::Topology::Options how;
  how.simulated_nodes = options.numa_nodes;
  TANDEM_ASSIGN_OR_RETURN(out.topology, topology::Topology::Detect(how));
  const auto nodes = static_cast<int>(out.topology->nodes().size());
  if (out.node >= nodes) {
    return absl::InvalidArgumentError(
        absl::StrCat("--numa-node ", out.node, ": there are ", nodes, " nodes, counted from 0"));
  }
  out.threads = options.threads;
  out.cpus = options.cpus;
  if (!out.cpus.empty()) {
    if (out.threads == 0) out.threads = static_cast<int>(out.cpus.size());
    return out;
  }
  TANDEM_ASSIGN_OR_RETURN(const std::vector<topology::ThreadPlan> plans, out.topology->PlanThreads(0));
  if (out.node < 0) {
    int cores = 0;
    for (const topology::ThreadPlan& plan : plans) cores += plan.threads;
    if (out.threads == 0) out.threads = cores;
    return out;
  }
  if (out.threads == 0) out.threads = plans[static_cast<size_t>(out.node)].threads;
  out.cpus = out.topology->nodes()[static_cast<size_t>(out.node)].CpusInOrder();
  return out;
}

// Says on the log how far loading is, every two seconds; passes a signal on to it.
class LoadWatcher {
 public:
  LoadWatcher(LoadProgress& progress, rpc::StopSignal& stop)
      : progress_(progress), stop_(stop), thread_([this] { Loop(); }) {}
  ~LoadWatcher() {
    done_ = true;
    thread_.join();
  }
  double Seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  void Loop() {
    for (int tick = 1; !done_; ++tick) {
      if (stop_.WaitFor(absl::Milliseconds(20)).has_value()) {
        progress_.cancel = true;
        while (!done_) absl::SleepFor(absl::Milliseconds(5));
        return;
      }
      const auto total = static_cast<double>(progress_.bytes_total);
      if (tick % 100 != 0 || total == 0) continue;
      const auto read = static_cast<double>(progress_.bytes_read);
      spdlog::info("loading: {:.0f} % ({:.1f} of {:.1f} GB, {:.2f} GB/s)", 100 * read / total, read / 1e9,
                   total / 1e9, read / 1e9 / Seconds());
    }
  }

  LoadProgress& progress_;
  rpc::StopSignal& stop_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::atomic<bool> done_{false};
  std::thread thread_;
};

absl::StatusOr<std::unique_ptr<Shard>> LoadShard(const Options& options, const Placement& placement,
                                                 LoadProgress& progress, rpc::StopSignal& stop) {
  LoadOptions load;
  load.request = options.shard;
  load.threads = options.load_threads;
  load.arena = options.arena;
  load.progress = &progress;
  if (!options.memory_check) load.usable_memory_bytes = std::numeric_limits<uint64_t>::max();
  if (placement.node >= 0) {
    load.bind_memory = [&](void* data, uint64_t bytes) {
      const absl::Status bound = placement.topology->BindMemory(data, bytes, placement.node);
      if (!bound.ok()) spdlog::warn("memory is not bound to node {}: {}", placement.node, bound.ToString());
    };
  }
  const LoadWatcher watcher(progress, stop);
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<Shard> shard, Shard::Load(options.model, load));
  const double gigabytes = static_cast<double>(progress.bytes_read) / 1e9;
  spdlog::info("loaded {}: {}, {:.2f} GB in {:.1f} s ({:.2f} GB/s)", shard->model_name(),
               shard->plan().DebugString(), gigabytes, watcher.Seconds(), gigabytes / watcher.Seconds());
  spdlog::info("weights lie in {}", shard->arena().Description());
  return shard;
}

// Bytes a second that the pool reads of the shard's own memory; half a second at most on any machine.
double MeasureCeiling(const Shard& shard, threading::ThreadPool& pool) {
  constexpr uint64_t kMost = uint64_t{1} << 30;
  const auto bytes = static_cast<int64_t>(std::min(shard.resident_bytes(), kMost));
  double best = 0;
  for (int i = 0; i < 3; ++i)
    best = std::max(best, kernels::MeasureReadBandwidth(pool, shard.memory(), bytes));
  return best;
}

absl::Status Serve(const Options& options, rpc::StopSignal& stop) {
  TANDEM_ASSIGN_OR_RETURN(const Placement placement, Place(options));
  telemetry::Metrics metrics("expert");
  if (!options.metrics_listen.empty()) {
    TANDEM_ASSIGN_OR_RETURN(const int port, metrics.Serve(options.metrics_listen));
    spdlog::info("metrics at port {}", port);
  }
  LoadProgress progress;
  ExpertsService service(metrics, progress, {placement.node, placement.threads});
  // Outlive the server, whose handlers use them.
  std::unique_ptr<Shard> shard;
  std::unique_ptr<threading::ThreadPool> pool;
  std::unique_ptr<Moe> moe;

  rpc::ServerOptions server_options;
  server_options.listen = options.listen;
  server_options.tls = options.tls;
  server_options.health_names = {ExpertsService::name()};
  TANDEM_ASSIGN_OR_RETURN(const std::unique_ptr<rpc::Server> server,
                          rpc::Server::Start(server_options, {service.service()}));
  for (const std::string& address : server->addresses()) spdlog::info("listening at {}", address);

  TANDEM_ASSIGN_OR_RETURN(shard, LoadShard(options, placement, progress, stop));
  threading::ThreadPool::Options pool_options;
  pool_options.threads = placement.threads;
  pool_options.cpus = placement.cpus;
  pool_options.name = "tandem-x";
  pool = std::make_unique<threading::ThreadPool>(pool_options);
  Moe::Options moe_options;
  moe_options.precision = options.precision;
  moe_options.max_tokens = options.max_tokens;
  moe = std::make_unique<Moe>(*shard, *pool, moe_options);
  const double ceiling = MeasureCeiling(*shard, *pool);
  spdlog::info("weights can be read at {:.1f} GB/s", ceiling / 1e9);
  // Only speed depends on it.
  const absl::StatusOr<std::string> reading = ChooseReading(*shard, *moe, {});
  if (reading.ok()) {
    spdlog::info("weights are read by way of {}", *reading);
  } else {
    spdlog::warn("no way of reading weights was tried, the usual one is taken: {}",
                 std::string(reading.status().message()));
  }
  service.SetReady(*shard, *moe, ceiling);
  if (options.ring) {
    RingOptions ring;
    ring.socket_path =
        options.ring_socket.empty() ? RingSocketPath(server->addresses()[0]) : options.ring_socket;
    ring.wait = shm::WaitPolicy::ForMachine(placement.threads);
    if (options.ring_spin_us >= 0) ring.wait.spin = absl::Microseconds(options.ring_spin_us);
    if (!placement.cpus.empty()) ring.cpu = placement.cpus[0];
    absl::Status enabled = service.EnableRing(ring);
    if (!enabled.ok() && !options.ring_socket.empty()) return enabled;
    if (enabled.ok()) {
      spdlog::info("shared memory through {}", ring.socket_path);
    } else {
      spdlog::warn("no shared memory, calls over gRPC only: {}", std::string(enabled.message()));
    }
  }
  server->SetServing(true);
  spdlog::info("serving: {} threads{}, {}, {}", pool->threads(),
               placement.cpus.empty() ? "" : " on CPUs " + topology::FormatCpuList(placement.cpus),
               kernels::IsaName(kernels::ActiveIsa()),
               options.precision == kernels::Precision::kFast ? "fast" : "reference");

  const int signal_number = stop.Wait();
  // Who stops a whole group (systemd) stops the engine at the same moment, and it lets its streams finish.
  const absl::Time deadline = absl::Now() + kDrainPatience;
  if (service.InUse(kQuiet)) spdlog::info("signal {}: stopping when the engine is done", signal_number);
  while (service.InUse(kQuiet) && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(50));
  spdlog::info("signal {}: stopping", signal_number);
  server->SetServing(false);
  service.Stop();
  server->Shutdown(kShutdownPatience);
  return absl::OkStatus();
}

}  // namespace

int Run(const Options& options) {
  rpc::StopSignal stop;
  telemetry::InitLog(options.numa_node < 0 ? "expert" : absl::StrCat("expert", options.numa_node));
  const absl::Status status = Serve(options, stop);
  if (status.ok() || (absl::IsCancelled(status) && stop.Received())) {
    spdlog::info("stopped");
    return 0;
  }
  spdlog::error("{}", std::string(status.message()));
  return 1;
}

}  // namespace tandem::expert
