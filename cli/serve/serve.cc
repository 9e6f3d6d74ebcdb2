#include "cli/serve/serve.h"

#include <signal.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "cli/serve/launch_plan.h"
#include "cli/serve/line_writer.h"
#include "cli/serve/preflight.h"
#include "cli/serve/runtime_folder.h"
#include "cli/serve/supervisor.h"
#include "cli/util/format.h"
#include "cli/util/http_client.h"
#include "cli/util/paths.h"
#include "common/base/listen.h"
#include "common/base/status_macros.h"
#include "common/rpc/channel.h"
#include "common/topology/gpu.h"
#include "common/topology/topology.h"

namespace tandem::cli {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kStopPatience{40000};  // the services give running requests 30 s

Supervisor* running = nullptr;  // for the signal handler

void OnSignal(int) {
  if (running != nullptr) running->RequestStop();
}

void Say(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
  std::fflush(stderr);
}

int Refuse(const absl::Status& status) {
  Say(absl::StrCat("tandem serve: ", std::string(status.message())));
  return status.code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
}

// The services read flags that they are not given from the environment. What this command decides must not be
// decided again there, for all of them alike, and its own flags come before the environment, which it has
// read itself.
void KeepOwnFlagsFromChildren() {
  for (const char* name : {"TANDEM_CONFIG",
                           "TANDEM_LISTEN",
                           "TANDEM_GRPC_LISTEN",
                           "TANDEM_METRICS_LISTEN",
                           "TANDEM_ENGINE",
                           "TANDEM_EXPERT",
                           "TANDEM_EXPERTS",
                           "TANDEM_SLICE",
                           "TANDEM_CPUS",
                           "TANDEM_THREADS",
                           "TANDEM_NUMA_NODE",
                           "TANDEM_NUMA_NODES",
                           "TANDEM_MODEL",
                           "TANDEM_MODEL_ID",
                           "TANDEM_GPU",
                           "TANDEM_PRECISION",
                           "TANDEM_CTX",
                           "TANDEM_MAX_BATCH_SIZE",
                           "TANDEM_CHUNK_SIZE",
                           "TANDEM_MAX_WAITING",
                           "TANDEM_KV_TOKENS",
                           "TANDEM_KV_HOST_GB",
                           "TANDEM_KV_CACHE_TYPE",
                           "TANDEM_PREFIX_CACHE",
                           "TANDEM_VRAM_GB",
                           "TANDEM_MEMORY_CHECK",
                           "TANDEM_DEFER_EXPERTS",
                           "TANDEM_MAX_DECODE_SLOWDOWN",
                           "TANDEM_STREAM_PREFILL",
                           "TANDEM_STREAM_SHARE",
                           "TANDEM_ARENA",
                           "TANDEM_STREAM_CHUNK_SIZE",
                           "TANDEM_EXPERT_GROUPS"}) {
    unsetenv(name);
  }
}

struct Prepared {
  std::string summary;
  Ports ports;
  std::vector<Process> processes;
};

absl::StatusOr<int> NodeCount(const ServeOptions& options) {
  if (options.numa == "auto") return 0;
  int nodes = 0;
  const char* end = options.numa.data() + options.numa.size();
  const auto [stop, error] = std::from_chars(options.numa.data(), end, nodes);
  if (error != std::errc() || stop != end || nodes < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("--numa ", options.numa, ": must be auto or a number from 1 on"));
  }
  return nodes;
}

// The GPU asked for must be there and usable; "auto" takes the CPU backend where there is none.
absl::Status CheckGpu(const ServeOptions& options) {
  if (options.gpu == "auto" || options.gpu == "none") return absl::OkStatus();
  int device = 0;
  const char* end = options.gpu.data() + options.gpu.size();
  const auto [stop, error] = std::from_chars(options.gpu.data(), end, device);
  if (error != std::errc() || stop != end || device < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--gpu ", options.gpu, ": must be auto, none or a device number"));
  }
  const topology::GpuReport report = topology::DetectGpus();
  if (device >= static_cast<int>(report.gpus.size())) {
    return absl::NotFoundError(absl::StrCat("--gpu ", device, ": there are ", report.gpus.size(), " GPUs",
                                            report.note.empty() ? "" : " (", report.note,
                                            report.note.empty() ? "" : ")"));
  }
  return absl::OkStatus();  // whether it can be used, tandem-attention says
}

// A file that is no model is not a mistake in the command line, as InvalidArgument says here.
absl::StatusOr<OpenedModel> OpenModelOfUser(const std::string& path, const std::string& expert_groups) {
  absl::StatusOr<OpenedModel> model = OpenModel(path, expert_groups);
  if (expert_groups == "auto" && absl::IsInvalidArgument(model.status())) {
    return absl::FailedPreconditionError(model.status().message());
  }
  return model;
}

absl::StatusOr<Prepared> Prepare(const ServeOptions& options, const std::string& runtime) {
  TANDEM_ASSIGN_OR_RETURN(const int numa, NodeCount(options));
  TANDEM_RETURN_IF_ERROR(CheckGpu(options));
  TANDEM_ASSIGN_OR_RETURN(const std::string path, ResolveModelPath(options));
  TANDEM_ASSIGN_OR_RETURN(const OpenedModel model, OpenModelOfUser(path, options.expert_groups));
  if (options.context > model.config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("--ctx ", options.context, ": the model's context is ",
                                                   model.config.max_position_embeddings, " tokens"));
  }
  const int asked = options.expert_processes > 0 ? static_cast<int>(options.expert_processes) : numa;
  TANDEM_ASSIGN_OR_RETURN(const topology::Topology topology,
                          topology::Topology::Detect({.simulated_nodes = asked}));
  const int processes = model.config.n_routed_experts == 0 ? 0 : static_cast<int>(topology.nodes().size());
  TANDEM_ASSIGN_OR_RETURN(const MemoryPlan plan,
                          PlanMemory(*model.file, model.config, options.context, std::max(1, processes)));
  const uint64_t needed = ServingBytes(options, plan, model.config, processes + 2);
  const topology::MemoryInfo memory = topology::ReadMemoryInfo();
  if (options.memory_check) TANDEM_RETURN_IF_ERROR(CheckMemory(needed, plan, memory));
  const uint64_t host_tier = HostTierBytes(options, needed, memory);
  Prepared out;
  TANDEM_ASSIGN_OR_RETURN(out.ports, ChoosePorts(options, processes));
  TANDEM_ASSIGN_OR_RETURN(out.processes, PlanProcesses(options, path, model.config, topology, out.ports,
                                                       runtime, ProgramFolder()));
  TANDEM_RETURN_IF_ERROR(CheckPrograms(out.processes));
  TANDEM_RETURN_IF_ERROR(CheckPorts(options, out.ports));
  out.summary = absl::StrCat(
      "model ", Printable(model.config.name), " (", path, "): ", FormatCount(plan.parameters),
      " parameters, ", FormatBytes(model.file->file_bytes()), "; ", FormatBytes(needed + host_tier),
      " of memory",
      host_tier == 0 ? "" : absl::StrCat(" (of it up to ", FormatBytes(host_tier), " --kv-host-gb)"), "; ",
      processes, " expert process", processes == 1 ? "" : "es",
      plan.shards.size() > 1 && plan.shards[0].sliced ? " (slices)"
      : plan.shards.size() > 1                        ? " (expert ranges)"
                                                      : "",
      options.gpu == "none" ? ", CPU backend" : "");  // else the engine says what it took
  return out;
}

constexpr absl::Duration kAlivePatience = absl::Seconds(2);

// What the gateway answers at its health path; 0: nothing.
int HealthOverHttp(const Process& process, milliseconds patience) {
  const size_t path = process.health.rfind('/');
  const absl::StatusOr<Url> url = ParseUrl(process.health.substr(0, path));
  if (!url.ok()) return 0;
  const auto reply = HttpClient(*url).Get(process.health.substr(path), patience);
  return reply.ok() ? reply->status : 0;
}

bool HasHttp(const Process& process) { return process.health.rfind("http://", 0) == 0; }

// One quick look: the supervisor asks again.
bool IsServing(const Process& process) {
  if (HasHttp(process)) return HealthOverHttp(process, milliseconds(500)) == 200;
  // No channel to a socket that is not there yet: it would begin with a back-off of its own.
  std::error_code error;
  if (!std::filesystem::exists(process.health.substr(process.health.find(':') + 1), error)) return false;
  const auto channel = rpc::Connect(process.health);
  return channel.ok() && rpc::WaitServing(**channel, process.health, absl::Milliseconds(150)).ok();
}

// Whatever it says: one that waits for its experts is alive.
bool IsAlive(const Process& process) {
  if (HasHttp(process)) return HealthOverHttp(process, absl::ToChronoMilliseconds(kAlivePatience)) != 0;
  const auto channel = rpc::Connect(process.health);
  return channel.ok() && rpc::Answers(**channel, kAlivePatience);
}

std::string ServerUrl(const ServeOptions& options, const Ports& ports) {
  const bool any = options.host == "0.0.0.0" || options.host == "::";
  return absl::StrCat("http://", HostPort{any ? "127.0.0.1" : options.host, ports.http}.ToString());
}

std::string Announcement(const ServeOptions& options, const Ports& ports, double seconds) {
  const std::string url = ServerUrl(options, ports);
  return absl::StrCat(absl::StrFormat("\nTandem is ready (after %.1f s) at ", seconds), url,
                      ", gRPC at port ", ports.grpc, ". Try it:\n\n  tandem chat",
                      ports.http == 10002 ? "" : " --url " + url, "\n\n  curl -N ", url,
                      "/v1/chat/completions -H 'Content-Type: application/json' \\\n"
                      "    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"What is 123 + 456?\"}], "
                      "\"stream\": true}'\n\n"
                      "Ctrl-C stops it.");
}

}  // namespace

int RunServe(const ServeOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  const absl::StatusOr<std::unique_ptr<RuntimeFolder>> runtime = RuntimeFolder::Make();
  if (!runtime.ok()) return Refuse(runtime.status());
  const absl::StatusOr<Prepared> prepared = Prepare(options, (*runtime)->path());
  if (!prepared.ok()) return Refuse(prepared.status());
  KeepOwnFlagsFromChildren();
  // Not as an argument, which every user of the machine could read.
  if (!options.api_key.empty()) setenv("TANDEM_API_KEY", options.api_key.c_str(), 1);
  Say(absl::StrCat("tandem: ", prepared->summary));

  const bool color = isatty(STDERR_FILENO) == 1;
  std::optional<LineWriter> log(std::in_place, STDERR_FILENO), out(std::in_place, STDOUT_FILENO);
  Supervisor::Options supervision;
  supervision.stop_patience = kStopPatience;
  supervision.on_line = [color, &log](const std::string& child, const std::string& line) {
    log->Add(color ? absl::StrCat("\033[2m[", child, "]\033[0m ", line)
                   : absl::StrCat("[", child, "] ", line));
  };
  supervision.on_event = [&log](const std::string& message) { log->Add(absl::StrCat("tandem: ", message)); };
  supervision.on_all_ready = [&] {
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    out->Add(Announcement(options, prepared->ports, took.count()));
  };
  int code = 0;
  {
    Supervisor supervisor(supervision);
    for (const Process& process : prepared->processes) {
      supervisor.Add({.name = process.name,
                      .argv = process.argv,
                      .ready = [&process] { return IsServing(process); },
                      .alive = [&process] { return IsAlive(process); },
                      .stop_order = process.stop_order});
    }
    running = &supervisor;
    struct sigaction action {};
    action.sa_handler = OnSignal;
    for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
      struct sigaction before {};
      sigaction(number, nullptr, &before);
      // nohup's wish is kept.
      if (number != SIGHUP || before.sa_handler != SIG_IGN) sigaction(number, &action, nullptr);
    }
    signal(SIGPIPE, SIG_IGN);
    code = supervisor.Run();
    for (const int number : {SIGINT, SIGTERM, SIGHUP}) signal(number, SIG_IGN);
    running = nullptr;
  }
  log->Add(code == 0 ? "tandem: stopped" : "tandem: failed, see above");
  out.reset();
  log.reset();
  return code;
}

}  // namespace tandem::cli
