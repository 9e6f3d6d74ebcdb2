#include "services/attention_gpu/backend/cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"
#include "common/base/thread_time.h"
#include "common/telemetry/log.h"
#include "services/attention_gpu/backend/cuda/bell.h"
#include "services/attention_gpu/backend/cuda/device.h"
#include "services/attention_gpu/backend/cuda/forward.h"
#include "services/attention_gpu/backend/cuda/host_experts.h"
#include "services/attention_gpu/backend/cuda/kernels.h"
#include "services/attention_gpu/backend/cuda/long_step.h"
#include "services/attention_gpu/backend/cuda/sampler.h"
#include "services/attention_gpu/backend/cuda/step_graph.h"
#include "services/attention_gpu/backend/cuda/streamed_prefill.h"
#include "services/attention_gpu/backend/cuda/weights.h"
#include "services/attention_gpu/backend/cuda/workspace.h"
#include "services/attention_gpu/experts/deferral.h"
#include "services/attention_gpu/experts/device_calls.h"

namespace tandem::attention {
namespace {

using cuda::ToStatus;

// Left free for the driver, the display and what else runs on the card.
constexpr uint64_t kReserve = uint64_t{400} << 20;
constexpr int kProbes = 9;                                        // graphs of empty calls for each bell
constexpr int64_t kMostTables = int64_t{1} << 22;                 // entries of page tables to make room for
constexpr absl::Duration kWorthSleeping = absl::Milliseconds(3);  // a graph as long as this

cuda::CacheType TypeOf(const CudaBackendOptions& o) {
  return o.int8_cache ? cuda::kCacheInt8 : cuda::kCacheBf16;
}

int64_t CacheRowBytes(const model::ModelConfig& c, const CudaBackendOptions& o) {
  return cuda::CacheRowBytes(TypeOf(o), c.kv_lora_rank, c.qk_rope_head_dim);
}

int64_t CacheBytesPerToken(const model::ModelConfig& c, const CudaBackendOptions& o) {
  return c.num_hidden_layers * CacheRowBytes(c, o);
}

bool Streams(const model::ModelConfig& c, const CudaBackendOptions& o) {
  return c.num_moe_layers() > 0 && o.stream_prefill.mode != StreamPrefill::Mode::kOff;
}

// The most tokens of any step.
int32_t StepTokens(const model::ModelConfig& c, const CudaBackendOptions& o) {
  return Streams(c, o) ? std::max(o.max_step_tokens, o.stream_step_tokens) : o.max_step_tokens;
}

cuda::Workspace WorkspaceFor(const model::ModelConfig& c, const CudaBackendOptions& o, int32_t tokens) {
  return cuda::Workspace(c, tokens, int64_t{o.page_count} * o.page_tokens);
}

cuda::StreamOptions StreamOptionsFor(const model::ModelConfig& c, const CudaBackendOptions& o) {
  cuda::StreamOptions s;
  s.max_tokens = StepTokens(c, o);
  s.buffer_bytes = o.stream_buffer_bytes;
  s.scratch_bytes = WorkspaceFor(c, o, StepTokens(c, o)).scratch_bytes();  // a long step's own
  return s;
}

uint64_t WorkspaceBytes(const model::ModelConfig& c, const CudaBackendOptions& o) {
  const uint64_t long_step = Streams(c, o) ? WorkspaceFor(c, o, StepTokens(c, o)).bytes() : 0;
  return WorkspaceFor(c, o, o.max_step_tokens).bytes() + long_step;
}

class CudaBackend : public Backend {
 public:
  CudaBackend(const model::ModelConfig& config, const CudaBackendOptions& options,
              std::unique_ptr<ExpertGroup> experts)
      : c_(config),
        options_(options),
        experts_(std::move(experts)),
        work_(WorkspaceFor(config, options, options.max_step_tokens)) {}

  ~CudaBackend() override {
    long_.reset();
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    if (graph_steps_ > 0) {
      spdlog::info(
          "GPU: {} steps as graphs, {:.0f} us of host CPU to launch one, {:.0f} for all of one slept "
          "through; {} "
          "steps launched one by one",
          graph_steps_, 1e6 * launch_cpu_seconds_ / static_cast<double>(graph_steps_),
          1e6 * slept_cpu_seconds_ / static_cast<double>(std::max<uint64_t>(slept_steps_, 1)),
          launched_steps_);
    }
    ForgetGraphs();
    bell_.reset();  // before the regions go
    if (done_ != nullptr) cudaEventDestroy(done_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  absl::Status Init(const gguf::File& file) {
    if (c_.num_moe_layers() > 0 && experts_ == nullptr) {
      return absl::InvalidArgumentError("the model has MoE layers, but no expert process was given");
    }
    TANDEM_RETURN_IF_ERROR(cuda::OpenDevice(options_.device).status());
    int least = 0, greatest = 0;
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest), "a stream"));
    TANDEM_RETURN_IF_ERROR(
        ToStatus(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "a stream"));
    TANDEM_RETURN_IF_ERROR(ToStatus(
        cudaEventCreateWithFlags(&done_, cudaEventDisableTiming | cudaEventBlockingSync), "an event"));
    {
      threading::ThreadPool pool(options_.threads);
      TANDEM_ASSIGN_OR_RETURN(weights_, cuda::DeviceWeights::Load(file, c_, pool));
    }
    cache_.type = TypeOf(options_);
    cache_.layer_bytes = int64_t{options_.page_count} * PageRow();
    cache_memory_.Want(&cache_.data, c_.num_hidden_layers * cache_.layer_bytes);
    TANDEM_RETURN_IF_ERROR(cache_memory_.Allocate("the KV cache"));
    page_memory_.Want(&page_staging_, page_bytes());
    TANDEM_RETURN_IF_ERROR(page_memory_.Allocate("pages on their way"));
    frequencies_ = model::RopeFrequencies(c_);
    TANDEM_RETURN_IF_ERROR(work_.Allocate());
    const int64_t rows = std::max<int64_t>(options_.max_step_tokens, GraphRows());
    TANDEM_RETURN_IF_ERROR(
        work_.Reserve(rows, Pairs(), std::min(GraphRows() * options_.page_count, kMostTables)));
    TANDEM_ASSIGN_OR_RETURN(sampler_, cuda::Sampler::Create(c_.vocab_size));
    forward_ = std::make_unique<cuda::Forward>(c_, *weights_, cache_, work_);
    if (experts_ != nullptr) {
      host_experts_ = std::make_unique<cuda::HostExperts>(c_, *experts_, options_.max_step_tokens,
                                                          options_.defer_experts > 0);
      TANDEM_RETURN_IF_ERROR(host_experts_->Allocate());
      ChooseBell();
    }
    if (Streams(c_, options_)) {
      long_ = std::make_unique<cuda::LongStep>(c_, *weights_, cache_, StepTokens(c_, options_),
                                               int64_t{options_.page_count} * options_.page_tokens,
                                               options_.device);
      TANDEM_RETURN_IF_ERROR(long_->Allocate(StepTokens(c_, options_), Pairs(), options_.page_count));
      cuda::StreamedPrefill::Options s;
      s.when = options_.stream_prefill;
      s.share = options_.stream_share;
      s.stream = StreamOptionsFor(c_, options_);
      s.stream.scratch = long_->work().scratch();  // between a layer's shared expert and the next layer
      s.call_tokens = options_.max_step_tokens;
      if (bell_ != nullptr) s.bell = bell_->kind();
      s.device = options_.device;
      s.time_rest = [this](int64_t tokens) { return TimeWithoutExperts(tokens); };
      s.rest_most = std::min({int64_t{StepTokens(c_, options_)}, kMostSharedTokens,
                              int64_t{options_.page_count} * options_.page_tokens});
      s.normed = long_->work().normed;
      s.x = long_->work().x;
      s.ids = long_->work().expert_ids;
      s.weights = long_->work().expert_weights;
      streamed_ = std::make_unique<cuda::StreamedPrefill>(c_, *experts_, s);
      streamed_->Open();
    }
    return CaptureAll();
  }

  std::string name() const override { return "cuda"; }
  int32_t page_tokens() const override { return options_.page_tokens; }
  int32_t page_count() const override { return options_.page_count; }
  int32_t max_step_tokens() const override { return options_.max_step_tokens; }
  int32_t max_long_tokens() const override { return StepTokens(c_, options_); }
  int32_t long_step_tokens(int64_t prompt_tokens, bool beside) const override {
    return streamed_ != nullptr ? static_cast<int32_t>(streamed_->step_tokens(prompt_tokens, beside))
                                : max_long_tokens();
  }
  int32_t long_prompt_tokens() const override { return LongPromptTokens(/*beside=*/true); }
  int32_t long_prompt_tokens_alone() const override { return LongPromptTokens(/*beside=*/false); }

  absl::Status RecoverExperts(absl::Duration patience) override {
    if (experts_ == nullptr) return absl::OkStatus();
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaSetDevice(options_.device), "the GPU"));
    DropLong();
    if (bell_ != nullptr) bell_->Detach();
    if (streamed_ != nullptr) streamed_->Close();  // a process that comes back needs the memory
    TANDEM_RETURN_IF_ERROR(experts_->Recover(patience));
    if (streamed_ != nullptr) streamed_->Open();
    if (bell_ == nullptr) return absl::OkStatus();
    const absl::Status attached = bell_->Attach(experts_->device_calls());
    if (!attached.ok()) {
      spdlog::warn("the GPU calls the experts through the host from now on: {}",
                   std::string(attached.message()));
      ForgetGraphs();
      bell_.reset();
    }
    return absl::OkStatus();
  }

  absl::Status Step(const StepBatch& batch, StepResult* result) override {
    if (Stream(batch)) {
      TANDEM_RETURN_IF_ERROR(BeginLong(batch));
      return AwaitLong(absl::InfiniteDuration(), result).status();
    }
    const auto n = static_cast<int64_t>(batch.tokens.size());
    TANDEM_RETURN_IF_ERROR(CheckStepTokens(batch, options_.max_step_tokens));
    *result = StepResult();
    result->sampled.resize(batch.sequences.size());
    if (n == 0) return absl::OkStatus();
    used_ = true;
    const OtherStep other(streamed_.get());
    // The caller's thread may be another one than Init's.
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaSetDevice(options_.device), "the GPU"));
    const double cpu = ThreadSeconds();
    TANDEM_RETURN_IF_ERROR(work_.LayOut(batch, frequencies_, options_.page_tokens));
    const bool bell = bell_ != nullptr && !batch.want_logits && n <= bell_->max_tokens();
    TANDEM_ASSIGN_OR_RETURN(cuda::StepGraph* const graph, GraphFor(batch));
    const int32_t defer = Defer(batch, graph != nullptr);
    if (bell) TANDEM_RETURN_IF_ERROR(bell_->Begin(cuda::Bell::CallsOf(c_.num_moe_layers(), defer)));
    absl::Status status = graph != nullptr ? graph->Launch(stream_) : LaunchAll(batch, bell, defer, result);
    const double launched = ThreadSeconds();
    // Whatever is still on its way uses the buffers of this step.
    const bool slept = graph != nullptr && last_graph_ > kWorthSleeping;
    status.Update(Drain(graph));
    if (bell) {
      const absl::Status finished = bell_->Finish(status.ok(), status);
      if (!finished.ok()) status = finished;  // says more
    }
    if (status.ok() && graph != nullptr) ReadRows(batch, work_, 0, n, result);
    if (graph != nullptr) {
      ++graph_steps_;
      launch_cpu_seconds_ += launched - cpu;
      if (slept) {
        ++slept_steps_;
        slept_cpu_seconds_ += ThreadSeconds() - cpu;
      }
    } else {
      ++launched_steps_;
    }
    return status;
  }

  bool long_beside_others() const override { return long_prompt_tokens_alone() > 0; }

  absl::Status BeginLong(const StepBatch& batch) override {
    TANDEM_RETURN_IF_ERROR(CheckStepTokens(batch, max_long_tokens()));
    if (long_ == nullptr || batch.tokens.empty() || batch.want_logits) {
      return absl::InvalidArgumentError("not a step to be streamed");
    }
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaSetDevice(options_.device), "the GPU"));
    used_ = true;
    return long_->Begin(batch, frequencies_, options_.page_tokens,
                        {[this] { return streamed_->Begin(); }, [this] { return streamed_->End(); }});
  }

  absl::StatusOr<bool> AwaitLong(absl::Duration most, StepResult* result) override {
    if (long_ == nullptr || !long_->active()) return absl::FailedPreconditionError("no long step");
    const std::optional<absl::Status> layers = long_->Await(most);
    if (!layers) return false;
    const StepBatch& batch = long_->batch();
    *result = StepResult();
    result->sampled.resize(batch.sequences.size());
    absl::Status status = *layers;
    status.Update(ToStatus(cudaSetDevice(options_.device), "the GPU"));
    if (status.ok()) status = Sample(batch, long_->work(), long_->forward(), long_->stream(), result);
    status.Update(ToStatus(cudaStreamSynchronize(long_->stream()), "a long step on the GPU"));
    ++launched_steps_;
    if (status.ok()) return true;
    spdlog::warn("prompts are not streamed any more: {}", std::string(status.message()));
    streamed_->Close();
    return status;
  }

  void DropLong() override {
    if (long_ != nullptr) long_->Drop();
  }

  int64_t page_bytes() const override {
    return int64_t{options_.page_tokens} * CacheBytesPerToken(c_, options_);
  }

  absl::Status CopyPageOut(int32_t page, std::span<std::byte> to) override {
    TANDEM_RETURN_IF_ERROR(CopyPage(page, page_staging_, PageRow(), LayerOf(page), cache_.layer_bytes,
                                    to.size(), cudaMemcpyDeviceToHost));
    std::memcpy(to.data(), page_staging_, to.size());
    return absl::OkStatus();
  }

  absl::Status CopyPageIn(std::span<const std::byte> from, int32_t page) override {
    std::memcpy(page_staging_, from.data(), std::min<size_t>(from.size(), page_bytes()));
    return CopyPage(page, LayerOf(page), cache_.layer_bytes, page_staging_, PageRow(), from.size(),
                    cudaMemcpyHostToDevice);
  }

 private:
  // A step that is none of streamed_'s.
  class OtherStep {
   public:
    explicit OtherStep(cuda::StreamedPrefill* streamed) : streamed_(streamed) {
      if (streamed_ != nullptr) streamed_->OthersBegin();
    }
    ~OtherStep() {
      if (streamed_ != nullptr) streamed_->OthersEnd();
    }
    OtherStep(const OtherStep&) = delete;
    OtherStep& operator=(const OtherStep&) = delete;

   private:
    cuda::StreamedPrefill* const streamed_;
  };
  // Routed experts that nobody computes.
  class NoExperts : public cuda::RoutedExperts {
   public:
    absl::Status Ask(const cuda::RoutedCall&, cudaStream_t) override { return absl::OkStatus(); }
    absl::Status Add(const cuda::RoutedCall&, cudaStream_t) override { return absl::OkStatus(); }
  };

  int32_t LongPromptTokens(bool beside) const {
    return streamed_ != nullptr ? static_cast<int32_t>(streamed_->from_tokens(beside)) : 0;
  }

  // Seconds of the layers of a prompt of so many tokens, but for its routed experts. Writes to the cache, so
  // only as long as nobody has anything there.
  absl::StatusOr<double> TimeWithoutExperts(int64_t tokens) {
    if (used_) return absl::FailedPreconditionError("the KV cache is in use");
    NoExperts none;
    StepBatch batch;
    batch.tokens.assign(static_cast<size_t>(tokens), 0);
    std::vector<int32_t> pages;
    while (static_cast<int64_t>(pages.size()) * options_.page_tokens < tokens) {
      pages.push_back(static_cast<int32_t>(pages.size()));
    }
    StepSequence& s = batch.sequences.emplace_back();
    s.count = static_cast<int32_t>(tokens);
    s.pages = pages;
    double seconds = 0;
    for (int i = 0; i < 2; ++i) {  // the first may load kernels
      const absl::Time begin = absl::Now();
      TANDEM_RETURN_IF_ERROR(long_->Begin(batch, frequencies_, options_.page_tokens,
                                          {[&none] { return &none; }, [] { return absl::OkStatus(); }}));
      TANDEM_RETURN_IF_ERROR(*long_->Await(absl::InfiniteDuration()));
      seconds = absl::ToDoubleSeconds(absl::Now() - begin);
    }
    return seconds;
  }

  // A page's rows of one layer.
  int64_t PageRow() const { return options_.page_tokens * CacheRowBytes(c_, options_); }
  uint8_t* LayerOf(int32_t page) const { return cache_.data + page * PageRow(); }
  int64_t Pairs() const { return static_cast<int64_t>(frequencies_.size()); }
  int64_t GraphRows() const {
    return std::min(
        {int64_t{options_.max_graph_rows}, int64_t{options_.max_step_tokens}, cuda::Workspace::kLogitsRows});
  }

  // A page's rows, one a layer, between host memory without gaps and the cache.
  absl::Status CopyPage(int32_t page, void* to, size_t to_pitch, const void* from, size_t from_pitch,
                        size_t size, cudaMemcpyKind kind) {
    if (page < 0 || page >= options_.page_count || static_cast<int64_t>(size) != page_bytes()) {
      return absl::InvalidArgumentError(absl::StrCat("page ", page, " of ", options_.page_count, ", ", size,
                                                     " bytes where ", page_bytes(), " are a page"));
    }
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaSetDevice(options_.device), "the GPU"));
    TANDEM_RETURN_IF_ERROR(ToStatus(
        cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, PageRow(), c_.num_hidden_layers, kind, stream_),
        "copying a page"));
    return ToStatus(cudaStreamSynchronize(stream_), "copying a page");
  }

  absl::StatusOr<std::unique_ptr<cuda::Bell>> OpenBell(cuda::BellKind kind) {
    DeviceCalls* const calls = experts_->device_calls();
    if (options_.defer_experts > 0 && calls != nullptr) {
      for (const DeviceRing& ring : calls->rings()) {
        const uint32_t slots = ring.layout.shape().slots;
        if (slots >= kDeferralSlots) continue;
        return absl::UnimplementedError(
            absl::StrCat("deferring experts takes rings of ", kDeferralSlots, " slots, not ", slots));
      }
    }
    return cuda::Bell::Open(c_, calls, kind, options_.device);
  }

  // The bell that was asked for, or the fastest that works; none: the host calls.
  void ChooseBell() {
    const std::string& wanted = options_.bell;
    std::optional<cuda::BellKind> best;
    double best_microseconds = 0;
    for (cuda::BellKind kind :
         {cuda::BellKind::kStreamMemory, cuda::BellKind::kKernel, cuda::BellKind::kHostFunction}) {
      if (wanted != "auto" && wanted != cuda::BellName(kind)) continue;
      const int64_t calls = std::max<int64_t>(1, c_.num_moe_layers());
      auto trip = absl::StatusOr<cuda::Bell::RoundTrip>(absl::UnknownError(""));
      // A region is shown to the GPU by one at a time: each bell is closed again.
      const auto bell = OpenBell(kind);
      if (bell.ok()) trip = (*bell)->Measure(calls, kProbes, stream_);
      const absl::Status& status = bell.ok() ? trip.status() : bell.status();
      if (!status.ok()) {
        spdlog::info("bell by {}: not possible: {}", cuda::BellName(kind), std::string(status.message()));
        continue;
      }
      spdlog::info("bell by {}: {:.1f} us for an empty call of the GPU; host CPU {:.0f} us for {} calls",
                   cuda::BellName(kind), trip->microseconds, trip->host_microseconds, calls);
      if (best && trip->microseconds >= best_microseconds) continue;
      best = kind;
      best_microseconds = trip->microseconds;
    }
    if (best) {
      auto bell = OpenBell(*best);
      if (bell.ok()) bell_ = std::move(*bell);
    }
    spdlog::info("{}", bell_ == nullptr ? std::string("the host calls the experts for the GPU")
                                        : absl::StrCat("the GPU calls the experts by itself (bell by ",
                                                       std::string(cuda::BellName(bell_->kind())), ")"));
  }

  void ForgetGraphs() {
    graphs_.clear();
    greedy_graphs_.clear();
  }

  absl::Status CaptureAll() {
    if (c_.num_moe_layers() > 0 && bell_ == nullptr) return absl::OkStatus();  // the host is in between
    const absl::Time begin = absl::Now();
    size_t nodes = 0;
    for (int64_t n = 1; n <= GraphRows(); ++n) {
      for (const bool greedy : {true, false}) {
        TANDEM_ASSIGN_OR_RETURN(auto graph, Capture(n, greedy));
        nodes = graph->node_count();
        (greedy ? greedy_graphs_ : graphs_).push_back(std::move(graph));
      }
    }
    graphs_work_ = work_.generation();
    graphs_bell_ = bell_ != nullptr ? bell_->generation() : 0;
    if (graphs_.empty()) return absl::OkStatus();
    spdlog::info("graphs for steps of 1 to {} rows captured in {:.2f} s, {} nodes each", graphs_.size(),
                 absl::ToDoubleSeconds(absl::Now() - begin), nodes);
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<cuda::StepGraph>> Capture(int64_t n, bool greedy) {
    const int64_t longest = int64_t{options_.page_count} * options_.page_tokens;
    work_.Point(n, Pairs(), options_.page_tokens, cuda::SplitsOf(longest));
    return cuda::StepGraph::Capture(stream_, bell_.get(), [&]() -> absl::Status {
      TANDEM_RETURN_IF_ERROR(forward_->Layers(bell_.get(), options_.defer_experts, stream_));
      TANDEM_RETURN_IF_ERROR(forward_->Logits(0, n, stream_));
      return greedy ? sampler_->LaunchGreedy(work_.logits, n, stream_)
                    : sampler_->Launch(work_.logits, n, stream_);
    });
  }

  // The graph for a batch of which each sequence decodes one token, whose sampling is staged; null if it is
  // another.
  absl::StatusOr<cuda::StepGraph*> GraphFor(const StepBatch& batch) {
    const size_t n = batch.tokens.size();
    if (n > graphs_.size() || n != batch.sequences.size() || batch.want_logits || work_.ranges.size() != 1) {
      return nullptr;
    }
    for (const StepSequence& s : batch.sequences) {
      if (!s.sample) return nullptr;
    }
    if (graphs_work_ != work_.generation() || (bell_ != nullptr && graphs_bell_ != bell_->generation())) {
      ForgetGraphs();
      const absl::Status captured = CaptureAll();
      if (!captured.ok()) {
        spdlog::warn("no graphs any more: {}", std::string(captured.message()));
        ForgetGraphs();
      }
      // Capturing has pointed the workspace elsewhere.
      TANDEM_RETURN_IF_ERROR(work_.LayOut(batch, frequencies_, options_.page_tokens));
      if (graphs_.empty()) return nullptr;
    }
    TANDEM_RETURN_IF_ERROR(StageRows(batch, work_, 0, static_cast<int64_t>(n)));
    return (sampler_->greedy() ? greedy_graphs_ : graphs_)[n - 1].get();
  }

  // Each kernel by itself; also what the graphs leave out.
  absl::Status LaunchAll(const StepBatch& batch, bool bell, int32_t defer, StepResult* result) {
    if (host_experts_ != nullptr) host_experts_->Trace(batch.want_logits ? &result->routing : nullptr);
    cuda::RoutedExperts* experts = bell_.get();
    if (!bell) experts = host_experts_.get();
    TANDEM_RETURN_IF_ERROR(forward_->Layers(experts, defer, stream_));
    return Sample(batch, work_, *forward_, stream_, result);
  }

  // The tokens behind the layers, which are on `stream`, and the logits if they are wanted.
  absl::Status Sample(const StepBatch& batch, const cuda::Workspace& work, cuda::Forward& forward,
                      cudaStream_t stream, StepResult* result) {
    const auto total = static_cast<int64_t>(work.wanted.size());
    if (batch.want_logits) result->logits.resize(total * c_.vocab_size);
    for (int64_t at = 0; at < total; at += cuda::Workspace::kLogitsRows) {
      const int64_t count = std::min(cuda::Workspace::kLogitsRows, total - at);
      TANDEM_RETURN_IF_ERROR(forward.Logits(at, count, stream));
      TANDEM_RETURN_IF_ERROR(StageRows(batch, work, at, count));
      if (batch.want_logits) {  // before the sampler changes them
        TANDEM_RETURN_IF_ERROR(
            ToStatus(cudaMemcpyAsync(result->logits.data() + at * c_.vocab_size, work.logits,
                                     count * c_.vocab_size * sizeof(float), cudaMemcpyDeviceToHost, stream),
                     "copying the logits"));
      }
      TANDEM_RETURN_IF_ERROR(sampler_->greedy() ? sampler_->LaunchGreedy(work.logits, count, stream)
                                                : sampler_->Launch(work.logits, count, stream));
      TANDEM_RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(stream), "a step on the GPU"));
      ReadRows(batch, work, at, count, result);
    }
    return absl::OkStatus();
  }

  // Whether the step's experts are streamed: it has the tokens that are worth it, and the routing is not
  // asked for, which stays on the device then.
  bool Stream(const StepBatch& batch) const {
    if (streamed_ == nullptr || !streamed_->open() || batch.want_logits || long_->active()) return false;
    const auto n = static_cast<int64_t>(batch.tokens.size());
    if (batch.tokens.size() == batch.sequences.size()) return false;  // decodes
    if (n > options_.max_step_tokens) return true;
    const bool decodes = HasGeneratedTokens(batch);
    const int64_t least = streamed_->from_tokens(decodes);
    return least > 0 && n >= least && (options_.defer_experts == 0 || !decodes);
  }

  // Experts that the step's generated tokens defer. A graph is made for steps that have some, and good for
  // others; streamed steps defer nothing.
  int32_t Defer(const StepBatch& batch, bool graph) const {
    return graph || HasGeneratedTokens(batch) ? options_.defer_experts : 0;
  }

  // Waits for the stream's end. A long graph is slept through: it needs no CPU. A short one is not, since
  // waking up takes a good part of a millisecond's tenth.
  absl::Status Drain(const cuda::StepGraph* graph) {
    const absl::Time begin = absl::Now();
    absl::Status status;
    if (graph != nullptr && last_graph_ > kWorthSleeping) {
      status = ToStatus(cudaEventRecord(done_, stream_), "a step on the GPU");
      if (status.ok()) status = ToStatus(cudaEventSynchronize(done_), "a step on the GPU");
    }
    status.Update(ToStatus(cudaStreamSynchronize(stream_), "a step on the GPU"));
    if (graph != nullptr) last_graph_ = absl::Now() - begin;
    return status;
  }

  // For the `count` wanted rows from `first` on: tells the sampler what is asked of them.
  absl::Status StageRows(const StepBatch& batch, const cuda::Workspace& work, int64_t first, int64_t count) {
    sequence_of_.assign(work.n, nullptr);  // by row; null: none samples there
    for (const StepSequence& s : batch.sequences) {
      if (s.sample) sequence_of_[s.first + s.count - 1] = &s;
    }
    std::vector<cuda::Sampler::Request> requests(count);
    for (int64_t i = 0; i < count; ++i) {
      const StepSequence* s = sequence_of_[work.wanted[first + i]];
      if (s != nullptr) requests[i] = {s->params, static_cast<uint64_t>(s->position + s->count), s->counts};
    }
    return sampler_->Stage(requests);
  }

  // After the stream's end: the tokens of those rows.
  void ReadRows(const StepBatch& batch, const cuda::Workspace& work, int64_t first, int64_t count,
                StepResult* result) const {
    for (int64_t i = 0; i < count; ++i) {
      const StepSequence* s = sequence_of_[work.wanted[first + i]];
      if (s != nullptr) result->sampled[s - batch.sequences.data()] = sampler_->Read(i);
    }
  }

  const model::ModelConfig c_;
  const CudaBackendOptions options_;
  std::unique_ptr<ExpertGroup> experts_;
  std::unique_ptr<cuda::DeviceWeights> weights_;
  cuda::Arena cache_memory_{cuda::Arena::Kind::kDevice};
  // Copies to and from ordinary memory take several times as long as these and one on the CPU.
  cuda::Arena page_memory_{cuda::Arena::Kind::kPinnedHost};
  std::byte* page_staging_ = nullptr;  // one page
  cuda::LatentCache cache_;
  cuda::Workspace work_;
  std::unique_ptr<cuda::Forward> forward_;
  std::unique_ptr<cuda::Sampler> sampler_;
  std::vector<const StepSequence*> sequence_of_;  // of what is staged
  std::unique_ptr<cuda::HostExperts> host_experts_;
  std::unique_ptr<cuda::StreamedPrefill> streamed_;  // null: never
  std::unique_ptr<cuda::LongStep> long_;             // streamed steps; null: never
  std::unique_ptr<cuda::Bell> bell_;                 // null: the host calls the experts
  // [n - 1] is for n rows, and for rows of which some are not plainly greedy or for others; captured for
  // these generations of the workspace and of the bell.
  std::vector<std::unique_ptr<cuda::StepGraph>> graphs_, greedy_graphs_;
  uint64_t graphs_work_ = 0, graphs_bell_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t done_ = nullptr;
  absl::Duration last_graph_;
  bool used_ = false;  // a step has written to the cache
  std::vector<float> frequencies_;
  uint64_t graph_steps_ = 0, slept_steps_ = 0, launched_steps_ = 0;
  // Of the calling threads: in steps as graphs until those were launched; in all of those slept through.
  double launch_cpu_seconds_ = 0, slept_cpu_seconds_ = 0;
};

absl::Status CheckShape(const model::ModelConfig& c, const CudaBackendOptions& o) {
  TANDEM_RETURN_IF_ERROR(CheckDeferExperts(c, o.defer_experts));
  auto refuse = [](const auto&... text) {
    return absl::UnimplementedError(absl::StrCat(text..., " (--gpu none computes on the CPU)"));
  };
  if (!cuda::AttentionSupports(static_cast<int32_t>(c.kv_lora_rank),
                               static_cast<int32_t>(c.qk_rope_head_dim))) {
    return refuse("the CUDA backend has no attention for kv_lora_rank ", c.kv_lora_rank, " and rope ",
                  c.qk_rope_head_dim, ", only for 512 and 64, 256 and 32");
  }
  if (c.n_routed_experts > 1024) {
    return refuse("the CUDA backend routes to 1024 experts at most, not ", c.n_routed_experts);
  }
  if (o.page_tokens % cuda::kAttentionTile != 0) {
    return absl::InvalidArgumentError(absl::StrCat("pages of ", o.page_tokens,
                                                   " tokens; the CUDA backend needs ", "a multiple of ",
                                                   cuda::kAttentionTile));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CudaPlan> PlanCuda(const gguf::File& file, const model::ModelConfig& c,
                                  const CudaBackendOptions& o) {
  TANDEM_ASSIGN_OR_RETURN(const cuda::Device device, cuda::OpenDevice(o.device));
  TANDEM_RETURN_IF_ERROR(CheckShape(c, o));
  CudaPlan plan;
  plan.gpu = absl::StrCat(device.name, " (", device.major, ".", device.minor, ")");
  TANDEM_ASSIGN_OR_RETURN(plan.weights, cuda::DeviceWeights::Plan(file, c));
  const int64_t token_bytes = CacheBytesPerToken(c, o);
  const auto cache = CheckedMul<int64_t>(token_bytes, int64_t{o.page_count} * o.page_tokens);
  if (!cache) return absl::InvalidArgumentError("the KV cache's size is out of range");
  plan.cache = static_cast<uint64_t>(*cache);
  if (Streams(c, o)) {
    plan.stream = cuda::StreamedExperts::DeviceBytes(c, StreamOptionsFor(c, o)) +
                  cuda::SharedCalls::DeviceBytes(c, StepTokens(c, o));
  }
  plan.workspace = WorkspaceBytes(c, o) + cuda::Sampler::DeviceBytes() +
                   cuda::HostExperts::DeviceBytes(c, o.max_step_tokens, o.defer_experts > 0);
  plan.available = device.free_bytes > kReserve ? device.free_bytes - kReserve : 0;
  if (o.vram_limit > 0) plan.available = std::min(plan.available, o.vram_limit);
  if (plan.total() <= plan.available) return plan;
  const uint64_t fixed = plan.weights + plan.workspace + plan.stream;
  std::string advice = "the weights alone do not fit";
  if (fixed < plan.available) {
    advice = absl::StrCat("a KV cache of ", (plan.available - fixed) / token_bytes,
                          " tokens would fit (--kv-tokens)");
  }
  return absl::ResourceExhaustedError(absl::StrCat("not enough GPU memory: ", plan.ToString(), "; ", advice));
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const gguf::File& file,
                                                           const model::ModelConfig& config,
                                                           const CudaBackendOptions& options,
                                                           std::unique_ptr<ExpertGroup> experts) {
  TANDEM_RETURN_IF_ERROR(CheckShape(config, options));
  TANDEM_RETURN_IF_ERROR(cuda::DeviceWeights::Plan(file, config).status());  // shapes without a kernel
  auto backend = std::make_unique<CudaBackend>(config, options, std::move(experts));
  TANDEM_RETURN_IF_ERROR(backend->Init(file));
  return backend;
}

}  // namespace tandem::attention
