#include "services/attention_gpu/service/engine.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"
#include "common/kernels/kernels.h"
#include "common/model/cache_sizes.h"
#include "common/model/config.h"
#include "common/model/tensors.h"
#include "common/shm/flag.h"
#include "common/telemetry/log.h"
#include "common/telemetry/metrics.h"
#include "common/topology/cpu_list.h"
#include "common/topology/limits.h"
#include "services/attention_gpu/backend/cpu/cpu_backend.h"
#include "services/attention_gpu/backend/cuda/cuda_backend.h"
#include "services/attention_gpu/experts/deferral.h"
#include "services/attention_gpu/experts/expert_group.h"
#include "services/attention_gpu/experts/expert_watch.h"
#include "services/attention_gpu/scheduler/scheduler.h"
#include "services/attention_gpu/service/choose_gpu.h"
#include "services/attention_gpu/service/engine_metrics.h"
#include "services/attention_gpu/service/engine_service.h"

namespace tandem::attention {
namespace {

constexpr int32_t kPageTokens = 32;

std::string RandomId() {
  std::random_device r;
  return absl::StrFormat("%08x%08x", r(), r());
}

std::string MetadataOf(const gguf::File& file) {
  gguf::Writer writer;
  for (const auto& [key, value] : file.metadata()) writer.AddValue(key, value);
  return writer.SerializeMetadata();
}

double Gigabytes(uint64_t bytes) { return static_cast<double>(bytes) / 1e9; }

struct Sizes {
  int32_t context = 0;    // tokens of a sequence
  int32_t pages = 0;      // of the cache in host memory
  int32_t gpu_least = 0;  // of the cache on a GPU: from
  int32_t gpu_most = 0;   // to, by what memory is left there
};

absl::StatusOr<Sizes> ChooseSizes(const Options& o, const model::ModelConfig& c) {
  const int64_t context = o.ctx > 0 ? o.ctx : model::DefaultContext(c);
  if (context > c.max_position_embeddings) {
    return absl::InvalidArgumentError(
        absl::StrCat("--ctx ", context, ": the model's context is ", c.max_position_embeddings, " tokens"));
  }
  if (context < 2) return absl::InvalidArgumentError("--ctx must be 2 at least");
  if (o.kv_tokens > 0 && o.kv_tokens < context) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--kv-tokens ", o.kv_tokens, " is less than one sequence of --ctx ", context, " tokens"));
  }
  const auto pages = [&o](int64_t by_default) {
    const int64_t tokens = o.kv_tokens > 0 ? o.kv_tokens : by_default;
    return static_cast<int32_t>((tokens + kPageTokens - 1) / kPageTokens);
  };
  return Sizes{.context = static_cast<int32_t>(context),
               .pages = pages(model::DefaultCacheTokens(c, context, o.max_batch_size)),
               .gpu_least = pages(context),
               .gpu_most = pages(context * o.max_batch_size)};
}

// What the KV cache and the weights take of host memory.
struct HostNeeds {
  uint64_t weights = 0;  // of all but the routed experts
  uint64_t cache = 0;
  uint64_t total() const { return weights + cache; }
};

HostNeeds HostNeedsOf(const gguf::File& file, const model::ModelConfig& c, int32_t pages) {
  HostNeeds needs;
  for (const gguf::Tensor& tensor : file.tensors()) {
    if (!model::IsRoutedExpertTensor(tensor.name)) needs.weights += tensor.nbytes;
  }
  needs.cache =
      static_cast<uint64_t>(int64_t{pages} * kPageTokens * model::CacheBytesPerToken(c, sizeof(float)));
  return needs;
}

// The cache is taken page by page as it is used and the weights are mapped: without a look beforehand, the
// end would come in the midst of a request.
absl::Status CheckMemory(const gguf::File& file, const HostNeeds& needs, double kv_host_gb) {
  const topology::MemoryInfo memory = topology::ReadMemoryInfo();
  const auto host_tier = static_cast<uint64_t>(std::max(0.0, kv_host_gb) * 1e9);
  const uint64_t needed = needs.total() + host_tier;
  if (memory.total_bytes == 0 || needed <= memory.UsableBytes()) return absl::OkStatus();
  const auto gb = [](uint64_t bytes) { return absl::StrFormat("%.2f GB", Gigabytes(bytes)); };
  return absl::ResourceExhaustedError(
      absl::StrCat(file.paths().front(), ": not enough memory: ", gb(needed), " are needed (KV cache ",
                   gb(needs.cache), ", --kv-host-gb ", gb(host_tier), ", weights without routed experts ",
                   gb(needs.weights), "), ", gb(memory.UsableBytes()),
                   " are available: a smaller --kv-tokens, --ctx or --max-batch-size needs less, "
                   "--memory-check=false tries all the same"));
}

// Bytes of the host tier. To be asked when the experts have their memory: what is left then is nobody's.
int64_t ChooseHostTier(const Options& o, const HostNeeds& needs) {
  if (o.kv_host_gb >= 0) return static_cast<int64_t>(o.kv_host_gb * 1e9);
  if (!o.prefix_cache) return 0;
  const uint64_t usable = topology::ReadMemoryInfo().UsableBytes();
  const uint64_t left = usable > needs.total() ? usable - needs.total() : 0;
  const uint64_t bytes = model::DefaultHostTierBytes(left);
  spdlog::info(
      "host tier of the KV cache: {:.1f} GB, of {:.1f} GB that are left (--kv-host-gb says otherwise)",
      Gigabytes(bytes), Gigabytes(left));
  return static_cast<int64_t>(bytes);
}

// Prompt tokens of a step by default. The processes read and decode the experts' weights for every step: the
// more tokens share them the better. On a GPU a step's tokens take its memory, and long prompts are streamed
// where they can be.
constexpr int32_t kChunkOnCpu = 512, kChunkBesideStreaming = 256, kChunkOnGpu = 1024;

int32_t ChunkSize(const Options& o, int32_t by_default) {
  return o.chunk_size > 0 ? o.chunk_size : by_default;
}
int32_t ChunkOnGpu(const Options& o, const CudaBackendOptions& gpu) {
  return ChunkSize(
      o, gpu.stream_prefill.mode == StreamPrefill::Mode::kOff ? kChunkOnGpu : kChunkBesideStreaming);
}

int32_t MaxStepTokens(const Options& o, int32_t chunk) {
  return std::max(chunk, o.mixed_chunk_size + o.max_batch_size);
}

// Whether the weights that prompts should stream cannot be had: then what streaming would take is the KV
// cache's, until the engine's next start. Not where a process is merely lost for the moment.
bool CannotStream(const CudaBackendOptions& gpu, ExpertGroup& experts) {
  if (gpu.stream_prefill.mode != StreamPrefill::Mode::kAuto) return false;
  const absl::Status mapped = experts.MapWeights().status();
  if (!absl::IsFailedPrecondition(mapped) && !absl::IsUnimplemented(mapped)) return false;
  spdlog::info("prompts are not streamed: {}", std::string(mapped.message()));
  return true;
}

// Everything from the model file to the scheduler; what must live as long as it serves.
struct Loaded {
  std::unique_ptr<gguf::File> file;
  EngineInfo info;
  std::string backend;
  std::unique_ptr<Scheduler> scheduler;
};

absl::StatusOr<threading::ThreadPool::Options> ChooseThreads(const Options& o) {
  threading::ThreadPool::Options threads;
  threads.threads = o.threads;
  threads.name = "attention";
  if (!o.cpus.empty()) {
    auto cpus = topology::ParseCpuList(o.cpus);
    if (!cpus.ok()) return Annotate(cpus.status(), "--cpus");
    threads.cpus = *cpus;
    if (threads.threads == 0) threads.threads = static_cast<int>(cpus->size());
  }
  return threads;
}

absl::StatusOr<Loaded> Load(const Options& o, EngineService& service) {
  Loaded out;
  TANDEM_ASSIGN_OR_RETURN(out.file, gguf::File::Open(o.model));
  TANDEM_ASSIGN_OR_RETURN(const model::ModelConfig c, model::ReadModelConfig(*out.file, o.expert_groups));
  spdlog::info("model {}: {} layers ({} dense), hidden {}, {} experts, top {}, groups {}/{} ({})", c.name,
               c.num_hidden_layers, c.first_k_dense_replace, c.hidden_size, c.n_routed_experts,
               c.num_experts_per_tok, c.n_group, c.topk_group, c.expert_groups_source);
  // What is wrong with the file is said now, not after the experts have been waited for.
  TANDEM_RETURN_IF_ERROR(model::BindTensors(*out.file, c).status());
  TANDEM_RETURN_IF_ERROR(CheckDeferExperts(c, o.defer_experts));
  if (o.defer_experts > 0) {
    spdlog::info("{} of a generated token's {} experts are added a layer later: answers change with it",
                 o.defer_experts, c.num_experts_per_tok);
  }
  TANDEM_ASSIGN_OR_RETURN(const Sizes sizes, ChooseSizes(o, c));
  TANDEM_ASSIGN_OR_RETURN(const threading::ThreadPool::Options threads, ChooseThreads(o));
  CudaBackendOptions on_gpu;
  on_gpu.threads = threads;
  on_gpu.page_tokens = kPageTokens;
  on_gpu.page_count = sizes.gpu_least;
  TANDEM_ASSIGN_OR_RETURN(on_gpu.stream_prefill, ParseStreamPrefill(o.stream_prefill));
  on_gpu.max_step_tokens = MaxStepTokens(o, ChunkOnGpu(o, on_gpu));
  TANDEM_ASSIGN_OR_RETURN(on_gpu.stream_share, ParseStreamShare(o.stream_share));
  on_gpu.max_graph_rows = o.max_batch_size;
  on_gpu.bell = o.gpu_bell;
  on_gpu.int8_cache = o.kv_cache_type == "int8";
  on_gpu.defer_experts = o.defer_experts;
  TANDEM_ASSIGN_OR_RETURN(std::optional<CudaBackendOptions> gpu,
                          ChooseGpu(o, *out.file, c, on_gpu, sizes.context, sizes.gpu_most));
  const HostNeeds needs = HostNeedsOf(*out.file, c, gpu ? 0 : sizes.pages);
  if (o.memory_check) TANDEM_RETURN_IF_ERROR(CheckMemory(*out.file, needs, o.kv_host_gb));

  const bool reference = o.precision == "reference";
  std::unique_ptr<ExpertGroup> experts;
  bool experts_share_cpus = false;
  if (c.num_moe_layers() > 0) {
    if (o.experts.empty()) {
      return absl::InvalidArgumentError(
          "the model has routed experts: give the address of an expert process "
          "with --expert, once for each");
    }
    service.SetProgress(absl::StrCat("waiting for ", o.experts.size(), " expert process(es)"));
    spdlog::info("waiting for {} expert process(es)", o.experts.size());
    ExpertOptions g;
    g.addresses = o.experts;
    g.tls = o.tls;
    g.reference_precision = reference;
    g.call_timeout = absl::Seconds(o.expert_timeout);
    g.attach_patience = absl::Seconds(o.attach_patience);
    g.transport = o.expert_transport == "ring"   ? ExpertTransport::kRing
                  : o.expert_transport == "grpc" ? ExpertTransport::kGrpc
                                                 : ExpertTransport::kAuto;
    g.max_call_tokens = MaxStepTokens(o, ChunkSize(o, gpu ? kChunkOnGpu : kChunkOnCpu));
    if (gpu && o.defer_experts > 0) g.slots = kDeferralSlots;
    const int busy_threads = o.threads > 0 ? o.threads : shm::AllowedCpus();
    g.spin = o.expert_spin_us >= 0 ? absl::Microseconds(o.expert_spin_us)
                                   : shm::WaitPolicy::ForMachine(busy_threads).spin;
    experts_share_cpus = busy_threads >= shm::AllowedCpus() &&
                         std::all_of(o.experts.begin(), o.experts.end(), [](const std::string& address) {
                           return address.rfind("unix:", 0) == 0;
                         });
    TANDEM_ASSIGN_OR_RETURN(experts, ConnectExperts(g, c, out.file->Fingerprint()));
    out.info.expert_processes = experts->processes();
    if (gpu && CannotStream(*gpu, *experts)) {
      on_gpu.stream_prefill.mode = StreamPrefill::Mode::kOff;
      on_gpu.max_step_tokens = MaxStepTokens(o, ChunkOnGpu(o, on_gpu));
      TANDEM_ASSIGN_OR_RETURN(auto again, ChooseGpu(o, *out.file, c, on_gpu, sizes.context, sizes.gpu_most));
      if (again) gpu = *again;  // else somebody else has taken the room: what was chosen before
    }
  }
  const int32_t pages = gpu ? gpu->page_count : sizes.pages;
  spdlog::info("KV cache: {} tokens in pages of {}, {}; context {} tokens", int64_t{pages} * kPageTokens,
               kPageTokens, gpu ? "on the GPU" : absl::StrFormat("%.1f MB", Gigabytes(needs.cache) * 1e3),
               sizes.context);

  service.SetProgress("preparing the weights");
  std::unique_ptr<Backend> backend;
  if (gpu) {
    TANDEM_ASSIGN_OR_RETURN(backend, CreateCudaBackend(*out.file, c, *gpu, std::move(experts)));
  } else {
    CpuBackendOptions b;
    b.precision = reference ? kernels::Precision::kReference : kernels::Precision::kFast;
    b.threads = threads;
    b.page_tokens = kPageTokens;
    b.page_count = pages;
    b.max_step_tokens = MaxStepTokens(o, ChunkSize(o, kChunkOnCpu));
    b.experts_share_cpus = experts_share_cpus;
    b.defer_experts = o.defer_experts;
    TANDEM_ASSIGN_OR_RETURN(backend, CreateCpuBackend(*out.file, c, b, std::move(experts)));
  }
  out.backend = backend->name();

  SchedulerOptions s;
  s.context_length = sizes.context;
  s.max_batch_size = o.max_batch_size;
  s.max_waiting = o.max_waiting;
  s.chunk_size = gpu ? std::min(ChunkOnGpu(o, *gpu), gpu->max_step_tokens) : ChunkSize(o, kChunkOnCpu);
  s.mixed_chunk_size = o.mixed_chunk_size;
  s.expert_patience = absl::Seconds(o.expert_patience);
  s.max_decode_slowdown = o.max_decode_slowdown;
  s.prefix_cache = o.prefix_cache;
  s.kv_host_bytes = ChooseHostTier(o, needs);
  s.vocab_size = c.vocab_size;
  TANDEM_ASSIGN_OR_RETURN(out.scheduler, Scheduler::Create(s, std::move(backend)));

  out.info.model_name = c.name;
  out.info.model_fingerprint = out.file->Fingerprint();
  out.info.architecture = "deepseek2";
  out.info.vocab_size = c.vocab_size;
  out.info.context_length = sizes.context;
  out.info.max_batch_size = o.max_batch_size;
  out.info.max_waiting = o.max_waiting;
  out.info.max_unread_tokens = o.max_unread_tokens;
  out.info.isa = std::string(kernels::IsaName(kernels::ActiveIsa()));
  out.info.instance_id = RandomId();
  out.info.metadata = MetadataOf(*out.file);
  return out;
}

// What this process says about its ability to compute, to gRPC health checks and in Engine.Describe. Follows
// the scheduler, whose steps run into a loss at once, and the watch, which sees one when there are no steps
// and makes the scheduler attach anew: a process that is back may be another one, with other weights.
class Readiness {
 public:
  Readiness(rpc::Server& server, EngineService& service, Scheduler& scheduler)
      : server_(server), service_(service), scheduler_(scheduler) {}

  // Begins to serve. `watch` may be null: a model without experts.
  void Start(const ExpertWatch* watch) {
    {
      const std::lock_guard lock(mutex_);
      watch_ = watch;
      started_ = true;
      server_.SetServing(true);
    }
    Update();
  }
  // For good.
  void Stop() {
    const std::lock_guard lock(mutex_);
    started_ = false;
    server_.SetServing(false);
  }

  void Update() {
    const std::lock_guard lock(mutex_);
    if (!started_) return;
    const std::string lost = watch_ == nullptr ? "" : watch_->lost();
    if (!lost.empty() && !seen_lost_) scheduler_.SuspectExperts(absl::UnavailableError(lost));
    seen_lost_ = !lost.empty();
    const std::string why = Why(scheduler_.Snapshot(), lost);
    if (why == why_) return;
    if (why.empty() != why_.empty()) server_.SetServing(why.empty());
    if (why.empty()) {
      spdlog::info("the experts are back");
    } else {
      spdlog::warn("{}; no step is computed until the experts are attached", why);
    }
    service_.SetDegraded(why);
    why_ = why;
  }

 private:
  // Empty: nothing is in the way. What is wrong with experts that are there comes first; that some are not
  // there the watch says in words that stay the same.
  std::string Why(const SchedulerSnapshot& now, const std::string& lost) const {
    if (now.healthy || (IsLoss(now.loss) && !lost.empty())) return lost;
    if (IsLoss(now.loss) && !why_.empty()) return why_;
    return absl::StrCat(IsLoss(now.loss) ? "the experts are lost: " : "the experts cannot be attached: ",
                        now.loss.message());
  }

  rpc::Server& server_;
  EngineService& service_;
  Scheduler& scheduler_;
  std::mutex mutex_;
  const ExpertWatch* watch_ = nullptr;
  bool started_ = false;
  bool seen_lost_ = false;  // by the watch
  std::string why_;         // as last said; empty: it computes
};

}  // namespace

absl::Status RunEngine(const Options& o, rpc::StopSignal& stop) {
  telemetry::Metrics metrics("attention");
  EngineMetrics engine_metrics(metrics);
  if (!o.metrics_listen.empty()) {
    auto port = metrics.Serve(o.metrics_listen);
    if (!port.ok()) return Annotate(port.status(), "--metrics-listen");
    spdlog::info("metrics on port {}", *port);
  }

  EngineService service;
  rpc::ServerOptions server_options;
  server_options.listen = o.listen;
  server_options.tls = o.tls;
  server_options.health_names = {EngineService::name()};
  Loaded loaded;  // before the server: calls hold on to the scheduler until the server has stopped
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<rpc::Server> server,
                          rpc::Server::Start(server_options, {service.service()}));
  for (const std::string& a : server->addresses()) spdlog::info("gRPC on {}", a);

  // Loading waits for experts, possibly for long; a stop must not wait for it.
  const absl::Time begin = absl::Now();
  std::atomic<bool> done = false;
  absl::StatusOr<Loaded> result = absl::UnknownError("not loaded");
  std::thread loader([&] {
    result = Load(o, service);
    done = true;
  });
  while (!done && !stop.WaitFor(absl::Milliseconds(20))) {
  }
  if (!done) {
    spdlog::info("stopped while loading");
    loader.detach();
    std::_Exit(0);  // nothing is served and nothing to lose; the loader may sit in a wait of minutes
  }
  loader.join();
  if (!result.ok()) return result.status();
  loaded = std::move(*result);
  Scheduler* scheduler = loaded.scheduler.get();
  Readiness readiness(*server, service, *scheduler);
  scheduler->OnHealthChange([&readiness](bool) { readiness.Update(); });
  std::unique_ptr<ExpertWatch> watch;
  if (loaded.info.expert_processes > 0) {
    ExpertWatch::Options w;
    w.addresses = o.experts;
    w.tls = o.tls;
    w.on_change = [&readiness] { readiness.Update(); };
    TANDEM_ASSIGN_OR_RETURN(watch, ExpertWatch::Start(std::move(w)));
  }
  service.SetReady(loaded.info, scheduler);
  readiness.Start(watch.get());
  spdlog::info("ready after {:.2f} s: {} backend, {}, {} expert process(es)",
               absl::ToDoubleSeconds(absl::Now() - begin), loaded.backend, loaded.info.isa,
               loaded.info.expert_processes);

  while (!stop.WaitFor(absl::Seconds(1))) {
    engine_metrics.Update(scheduler->Snapshot());
    readiness.Update();
  }

  spdlog::info("stopping: no new sequences, {} running", scheduler->Snapshot().running);
  scheduler->OnHealthChange(nullptr);
  readiness.Stop();
  watch.reset();
  if (!scheduler->Drain(absl::Seconds(o.drain_timeout))) {
    spdlog::warn("{} sequences were cut off after {} s", scheduler->Snapshot().running, o.drain_timeout);
  }
  server->Shutdown(absl::Seconds(1));
  return absl::OkStatus();
}

}  // namespace tandem::attention
