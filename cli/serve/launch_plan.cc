#include "cli/serve/launch_plan.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "cli/serve/ports.h"
#include "common/base/listen.h"
#include "common/base/status_macros.h"
#include "common/topology/cpu_list.h"

namespace tandem::cli {
namespace {

constexpr char kLocal[] = "127.0.0.1";

std::string MetricsAddress(const ServeOptions& options, int port) {
  return HostPort{MetricsHost(options), port}.ToString();
}

// With tandem-attention's words, which would come only after the weights are loaded.
absl::Status CheckDeferExperts(const ServeOptions& options, const model::ModelConfig& config) {
  const int64_t deferred = options.defer_experts;
  if (deferred == 0) return absl::OkStatus();
  if (config.n_routed_experts == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--defer-experts ", deferred, ": the model has no routed experts"));
  }
  if (deferred < config.num_experts_per_tok) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--defer-experts ", deferred, ": a token goes to ",
                                                 config.num_experts_per_tok, " experts, of which 0 to ",
                                                 config.num_experts_per_tok - 1, " can be deferred"));
}

}  // namespace

std::string MetricsHost(const ServeOptions& options) {
  if (options.host == "::") return "0.0.0.0";
  return options.host.find(':') == std::string::npos ? options.host : kLocal;
}

absl::StatusOr<Ports> ChoosePorts(const ServeOptions& options, int expert_processes) {
  Ports ports;
  std::vector<int> taken = {static_cast<int>(options.port), static_cast<int>(options.grpc_port)};
  const auto choose = [&](int64_t wanted, const std::string& host) -> absl::StatusOr<int> {
    if (wanted > 0) return static_cast<int>(wanted);
    absl::StatusOr<int> port = FreePort(host, taken);
    if (!port.ok()) return Annotate(port.status(), "--host");
    taken.push_back(*port);
    return port;
  };
  TANDEM_ASSIGN_OR_RETURN(ports.http, choose(options.port, options.host));
  TANDEM_ASSIGN_OR_RETURN(ports.grpc, choose(options.grpc_port, options.host));
  int64_t base = options.metrics_base_port;
  if (base < 0) base = options.port == 0 ? 0 : options.port + 9;
  constexpr int64_t kHighest = 65535;
  if (base + 10 + 2 * expert_processes > kHighest) base = 0;
  TANDEM_ASSIGN_OR_RETURN(ports.attention_metrics, choose(base, MetricsHost(options)));
  for (int i = 0; i < expert_processes; ++i) {
    TANDEM_ASSIGN_OR_RETURN(const int port, choose(base == 0 ? 0 : base + 10 + 2 * i, MetricsHost(options)));
    ports.expert_metrics.push_back(port);
  }
  std::vector<int> all = ports.expert_metrics;
  all.insert(all.end(), {ports.http, ports.grpc, ports.attention_metrics});
  std::sort(all.begin(), all.end());
  const auto twice = std::adjacent_find(all.begin(), all.end());
  if (twice != all.end()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "port ", *twice, " is asked for twice; --port, --grpc-port and --metrics-base-port must differ"));
  }
  return ports;
}

absl::StatusOr<std::vector<Process>> PlanProcesses(const ServeOptions& options, const std::string& model,
                                                   const model::ModelConfig& config,
                                                   const topology::Topology& topology, const Ports& ports,
                                                   const std::string& runtime, const std::string& programs) {
  TANDEM_RETURN_IF_ERROR(CheckDeferExperts(options, config));
  const int expert_processes = static_cast<int>(ports.expert_metrics.size());
  TANDEM_ASSIGN_OR_RETURN(const std::vector<topology::ThreadPlan> threads,
                          topology.PlanThreads(static_cast<int>(options.cpu_infer), expert_processes));
  const std::vector<ExpertShard> shards = ShareExperts(config, expert_processes);
  const auto socket = [&](const std::string& name) {
    return absl::StrCat("unix:", runtime, "/", name, ".sock");
  };
  std::vector<Process> out;

  std::set<int> cpus;
  int total_threads = 0;
  for (int i = 0; i < expert_processes; ++i) {
    Process expert;
    expert.name = absl::StrCat("expert", i);
    expert.health = socket(expert.name);
    expert.stop_order = 2;
    expert.argv = {programs + "/tandem-expert",
                   "--model=" + model,
                   "--listen=" + expert.health,
                   "--metrics-listen=" + MetricsAddress(options, ports.expert_metrics[i]),
                   absl::StrCat("--threads=", threads[i].threads),
                   "--cpus=" + topology::FormatCpuList(threads[i].cpus),
                   "--precision=" + options.precision};
    if (topology.nodes().size() > 1) {
      expert.argv.push_back(absl::StrCat("--numa-node=", i));
      if (topology.nodes()[i].simulated) {
        expert.argv.push_back(absl::StrCat("--numa-nodes=", topology.nodes().size()));
      }
    }
    if (expert_processes > 1 && shards[i].sliced) {
      expert.argv.push_back(absl::StrCat("--slice=", i, "/", expert_processes));
    } else if (expert_processes > 1) {  // from the first to before the second number
      expert.argv.push_back(
          absl::StrCat("--experts=", shards[i].first_expert, "-", shards[i].last_expert + 1));
    }
    if (!options.memory_check) expert.argv.push_back("--memory-check=false");
    if (!options.arena.empty()) expert.argv.push_back("--arena=" + options.arena);
    total_threads += threads[i].threads;
    cpus.insert(threads[i].cpus.begin(), threads[i].cpus.end());
    out.push_back(std::move(expert));
  }

  Process attention;
  attention.name = "attention";
  attention.health = socket(attention.name);
  attention.stop_order = 1;
  attention.argv = {programs + "/tandem-attention", "--model=" + model, "--listen=" + attention.health,
                    "--metrics-listen=" + MetricsAddress(options, ports.attention_metrics),
                    // The CPU backend computes while the experts wait, on the same cores.
                    absl::StrCat("--threads=", std::min<int>(total_threads, static_cast<int>(cpus.size()))),
                    "--cpus=" + topology::FormatCpuList({cpus.begin(), cpus.end()}),
                    "--precision=" + options.precision, "--expert-groups=" + options.expert_groups,
                    "--gpu=" + options.gpu};
  for (int i = 0; i < expert_processes; ++i) attention.argv.push_back("--expert=" + out[i].health);
  const auto pass = [&attention](const char* flag, auto value) {
    if (value > 0) attention.argv.push_back(absl::StrCat(flag, value));
  };
  pass("--ctx=", options.context);
  pass("--max-batch-size=", options.max_batch_size);
  pass("--chunk-size=", options.chunk_size);
  pass("--max-waiting=", options.max_waiting);
  pass("--kv-tokens=", options.kv_tokens);
  if (options.kv_host_gb >= 0) attention.argv.push_back(absl::StrCat("--kv-host-gb=", options.kv_host_gb));
  pass("--vram-gb=", options.vram_gb);
  attention.argv.push_back("--prefix-cache=" + options.prefix_cache);
  if (options.max_decode_slowdown >= 0) {
    attention.argv.push_back(absl::StrCat("--max-decode-slowdown=", options.max_decode_slowdown));
  }
  if (!options.memory_check) attention.argv.push_back("--memory-check=false");
  if (options.kv_cache_type != "bf16") attention.argv.push_back("--kv-cache-type=" + options.kv_cache_type);
  pass("--defer-experts=", options.defer_experts);
  if (!options.stream_prefill.empty()) {
    attention.argv.push_back("--stream-prefill=" + options.stream_prefill);
  }
  if (options.stream_chunk_size >= 0) {
    attention.argv.push_back(absl::StrCat("--stream-chunk-size=", options.stream_chunk_size));
  }
  if (!options.stream_share.empty()) attention.argv.push_back("--stream-share=" + options.stream_share);

  Process gateway;
  gateway.name = "gateway";
  // A wildcard address is asked at the loopback of its family.
  const std::string probe_host = options.host == "0.0.0.0" ? kLocal
                                 : options.host == "::"    ? "::1"
                                                           : options.host;
  gateway.health = absl::StrCat("http://", HostPort{probe_host, ports.http}.ToString(), "/ready");
  gateway.argv = {programs + "/tandem-gateway", "--engine=" + attention.health,
                  "--listen=" + HostPort{options.host, ports.http}.ToString(),
                  "--grpc-listen=" + HostPort{options.host, ports.grpc}.ToString()};
  if (!options.model_name.empty()) gateway.argv.push_back("--model-id=" + options.model_name);

  out.push_back(std::move(attention));
  out.push_back(std::move(gateway));
  return out;
}

}  // namespace tandem::cli
