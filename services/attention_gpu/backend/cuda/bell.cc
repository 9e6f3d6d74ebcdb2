#include "services/attention_gpu/backend/cuda/bell.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"
#include "common/base/thread_time.h"
#include "common/shm/call_region.h"
#include "common/shm/flag.h"
#include "services/attention_gpu/experts/expert_group.h"

namespace tandem::attention::cuda {
namespace {

constexpr auto kLook = std::chrono::milliseconds(50);  // of the watchdog
constexpr int kIdleLooks = 10;                         // without a run, after which it sleeps

static_assert(sizeof(WireRequest) <= sizeof(shm::RequestHeader) &&
              offsetof(WireRequest, epoch) == offsetof(shm::RequestHeader, epoch) &&
              offsetof(WireRequest, layer) == offsetof(shm::RequestHeader, layer) &&
              offsetof(WireRequest, rows) == offsetof(shm::RequestHeader, rows) &&
              offsetof(WireRequest, pairs) == offsetof(shm::RequestHeader, pairs) &&
              offsetof(WireRequest, input_type) == offsetof(shm::RequestHeader, input_type) &&
              offsetof(WireRequest, output_type) == offsetof(shm::RequestHeader, output_type) &&
              offsetof(WireRequest, precision) == offsetof(shm::RequestHeader, precision));
static_assert(sizeof(WireAnswer) <= sizeof(shm::AnswerHeader) &&
              offsetof(WireAnswer, epoch) == offsetof(shm::AnswerHeader, epoch) &&
              offsetof(WireAnswer, status) == offsetof(shm::AnswerHeader, status));

// Of the slot of call `number`.
shm::SlotControl& ControlOf(const DeviceRing& ring, uint64_t number) {
  return ring.layout.Control(ring.region, number % ring.layout.shape().slots);
}

SlotOffsets OffsetsOf(const DeviceRing& ring, shm::ValueType input, shm::ValueType output) {
  constexpr uint64_t kSlot = 0;
  shm::SlotControl& control = ControlOf(ring, kSlot);
  auto* const begin = reinterpret_cast<uint8_t*>(&control);
  const auto from = [&](const void* p) {
    return static_cast<uint64_t>(static_cast<const uint8_t*>(p) - begin);
  };
  SlotOffsets at;
  at.slots = ring.layout.shape().slots;
  at.slot_bytes = ring.layout.slot_bytes();
  at.bell = static_cast<uint32_t>(from(&control.bell.sequence));
  at.answered = static_cast<uint32_t>(from(&control.answered.sequence));
  at.request = static_cast<uint32_t>(from(&control.request));
  at.answer = static_cast<uint32_t>(from(&control.answer));
  at.ids = from(ring.layout.Ids(ring.region, kSlot, 1, 1).data());
  at.weights = from(ring.layout.Weights(ring.region, kSlot, 1, 1).data());
  at.input = from(ring.layout.Input(ring.region, kSlot, 1, input).data());
  at.output = from(ring.layout.Output(ring.region, kSlot, 1, output).data());
  return at;
}

bool Same(const SlotOffsets& a, const SlotOffsets& b) {
  return a.slots == b.slots && a.slot_bytes == b.slot_bytes && a.bell == b.bell && a.answered == b.answered &&
         a.request == b.request && a.answer == b.answer && a.ids == b.ids && a.weights == b.weights &&
         a.input == b.input && a.output == b.output;
}

double Median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

}  // namespace

std::string_view BellName(BellKind kind) {
  switch (kind) {
    case BellKind::kStreamMemory:
      return "stream";
    case BellKind::kKernel:
      return "kernel";
    case BellKind::kHostFunction:
      return "host";
  }
  return "";
}

std::optional<BellKind> BellOf(std::string_view name) {
  for (BellKind kind : {BellKind::kStreamMemory, BellKind::kKernel, BellKind::kHostFunction}) {
    if (BellName(kind) == name) return kind;
  }
  return std::nullopt;
}

Bell::Bell(const model::ModelConfig& config, BellKind kind, int device)
    : c_(config), kind_(kind), device_(device) {}

absl::StatusOr<std::unique_ptr<Bell>> Bell::Open(const model::ModelConfig& config, DeviceCalls* calls,
                                                 BellKind kind, int device) {
  if (calls == nullptr) {
    return absl::UnimplementedError("not all expert processes are called through shared memory");
  }
  if (config.hidden_size % 4 != 0) {
    return absl::UnimplementedError(absl::StrCat("a hidden size of ", config.hidden_size));
  }
  std::unique_ptr<Bell> bell(new Bell(config, kind, device));
  if (kind == BellKind::kStreamMemory) {
    TANDEM_ASSIGN_OR_RETURN(bell->driver_, StreamMemoryOps::Find(device));
  }
  TANDEM_RETURN_IF_ERROR(bell->Allocate());
  TANDEM_RETURN_IF_ERROR(bell->Attach(calls));
  bell->watchdog_ = std::thread([b = bell.get()] { b->Watch(); });
  return bell;
}

absl::Status Bell::Allocate() {
  device_memory_.Want(&states_, kMostRings);
  device_memory_.Want(&blocks_done_, 1);
  device_memory_.Want(&seen_, kSeen);
  host_memory_.Want(&host_states_, kMostRings);
  host_memory_.Want(&stop_, 1);
  host_memory_.Want(&failed_, 1);
  TANDEM_RETURN_IF_ERROR(device_memory_.Allocate("the bell"));
  TANDEM_RETURN_IF_ERROR(host_memory_.Allocate("the bell"));
  *stop_ = *failed_ = 0;
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaMemset(seen_, 0, kSeen * sizeof *seen_), "the bell"));
  return ToStatus(cudaMemset(blocks_done_, 0, sizeof *blocks_done_), "the bell");
}

Bell::~Bell() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  if (watchdog_.joinable()) watchdog_.join();
  Detach();
}

void Bell::Detach() {
  for (size_t i = 0; i < slots_.size(); ++i) cudaHostUnregister(rings_[i].region.data());
  slots_.clear();
  rings_.clear();
  calls_ = nullptr;
}

absl::Status Bell::Attach(DeviceCalls* calls) {
  Detach();
  if (calls == nullptr)
    return absl::UnimplementedError("an expert process is not called through shared memory");
  rings_ = calls->rings();
  if (rings_.empty() || rings_.size() > kMostRings) {
    return absl::UnimplementedError(
        absl::StrCat(rings_.size(), " expert processes; the GPU calls ", kMostRings));
  }
  for (const DeviceRing& ring : rings_) {
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaHostRegister(ring.region.data(), ring.region.size(),
                                                     cudaHostRegisterMapped | cudaHostRegisterPortable),
                                    "showing the expert's shared memory to the GPU"));
    slots_.push_back(nullptr);  // registered
    void* device = nullptr;
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaHostGetDevicePointer(&device, ring.region.data(), 0),
                                    "showing the expert's shared memory to the GPU"));
    const auto offset = reinterpret_cast<uint8_t*>(&ControlOf(ring, 0)) - ring.region.data();
    slots_.back() = static_cast<uint8_t*>(device) + offset;
  }
  const SlotOffsets at = OffsetsOf(rings_[0], calls->input_type(), calls->output_type());
  for (const DeviceRing& ring : rings_) {
    if (ring.layout.shape() != rings_[0].layout.shape())
      return absl::InternalError("rings of several shapes");
  }
  if (!Same(at, at_) || rings_.size() != ring_count_ || calls->input_type() != input_type_ ||
      calls->output_type() != output_type_) {
    ++generation_;
  }
  at_ = at;
  ring_count_ = rings_.size();
  input_type_ = calls->input_type();
  output_type_ = calls->output_type();
  calls_ = calls;
  return absl::OkStatus();
}

absl::Status Bell::Begin(uint64_t calls) {
  if (calls_ == nullptr) return absl::UnavailableError("the experts are not attached");
  TANDEM_ASSIGN_OR_RETURN(first_, calls_->BeginRun(calls));
  run_calls_ = calls;
  ++run_;
  // The run's first request fetches them.
  for (size_t i = 0; i < rings_.size(); ++i) host_states_[i] = {slots_[i], rings_[i].epoch, first_[i], run_};
  *failed_ = 0;
  *stop_ = 0;
  bool asleep;
  {
    const std::lock_guard lock(mutex_);
    running_ = true;
    watched_run_ = run_;
    asleep = std::exchange(asleep_, false);
  }
  if (asleep) changed_.notify_all();
  return absl::OkStatus();
}

uint64_t Bell::CallsOf(int64_t layers, int32_t defer) {
  if (layers < 1) return 0;
  return static_cast<uint64_t>(defer > 0 ? 2 * layers - 1 : layers);
}

// A step that defers makes two calls a layer, the deferred one behind the other, and one for the last layer.
uint32_t Bell::IndexOf(const RoutedCall& call) {
  return static_cast<uint32_t>(call.defer > 0 ? 2 * call.index : call.index);
}

absl::Status Bell::Ask(const RoutedCall& call, cudaStream_t stream) {
  const uint32_t index = IndexOf(call);
  if (call.defer == 0 || call.last) return AskFor(call, AskPart::kAll, index, stream);
  if (call.route != nullptr) TANDEM_RETURN_IF_ERROR(ToStatus(LaunchRoute(*call.route, stream), "the router"));
  TANDEM_RETURN_IF_ERROR(AskFor(call, AskPart::kDue, index, stream));
  return AskFor(call, AskPart::kDeferred, index + 1, stream);
}

absl::Status Bell::AskFor(const RoutedCall& call, AskPart part, uint32_t index, cudaStream_t stream) {
  AskParams p;
  p.part = part;
  p.defer = call.defer;
  p.defers = call.defers;
  p.rings = index == 0 ? host_states_ : states_;
  p.keep = index == 0 ? states_ : nullptr;
  p.count = static_cast<int32_t>(rings_.size());
  p.at = at_;
  p.index = index;
  p.layer = static_cast<uint32_t>(call.layer);
  p.input_type = static_cast<uint32_t>(input_type_);
  p.output_type = static_cast<uint32_t>(output_type_);
  p.precision = static_cast<uint32_t>(call.n > kMostExactTokens ? shm::CallPrecision::kBulk
                                                                : shm::CallPrecision::kServed);
  p.float_input = input_type_ == shm::ValueType::kF32;
  p.normed = call.normed;
  p.factors = call.factors;
  p.ids = call.ids;
  p.weights = call.weights;
  if (call.route != nullptr && part == AskPart::kAll) p.route = *call.route;
  p.n = static_cast<int32_t>(call.n);
  p.k = static_cast<int32_t>(c_.num_experts_per_tok);
  p.hidden = static_cast<int32_t>(c_.hidden_size);
  p.ring = kind_ == BellKind::kKernel;
  p.blocks_done = blocks_done_;
  TANDEM_RETURN_IF_ERROR(ToStatus(LaunchAsk(p, stream), "asking the experts"));
  return p.ring ? absl::OkStatus() : Put(MemoryOpKind::kWrite, p.index, stream);
}

absl::Status Bell::Add(const RoutedCall& call, cudaStream_t stream) {
  const uint32_t index = IndexOf(call);
  // The processes answer in order: what the layer before has deferred comes first, and is added while they
  // work on this layer's.
  if (call.defer > 0 && call.index > 0) TANDEM_RETURN_IF_ERROR(AddAnswer(call, index - 1, nullptr, stream));
  return AddAnswer(call, index, call.next, stream);
}

absl::Status Bell::AddAnswer(const RoutedCall& call, uint32_t index, const NormFormParams* next,
                             cudaStream_t stream) {
  AnswerParams p;
  p.rings = states_;
  p.count = static_cast<int32_t>(rings_.size());
  p.at = at_;
  p.index = index;
  p.double_output = output_type_ == shm::ValueType::kF64;
  p.x = call.x;
  p.n = static_cast<int32_t>(call.n);
  p.hidden = static_cast<int32_t>(c_.hidden_size);
  p.wait = kind_ == BellKind::kKernel;
  p.stop = stop_;
  p.failed = failed_;
  p.seen = seen_;
  if (next != nullptr) p.next = *next;
  if (!p.wait) TANDEM_RETURN_IF_ERROR(Put(MemoryOpKind::kWait, p.index, stream));
  return ToStatus(LaunchAddAnswers(p, stream), "the experts' answer");
}

std::vector<MemoryOp> Bell::OpsOf(MemoryOpKind kind, uint32_t index) const {
  std::vector<MemoryOp> out;
  for (size_t i = 0; i < slots_.size(); ++i) {
    // While a graph is captured there may not have been a run yet.
    const uint64_t number = (i < first_.size() ? first_[i] : 0) + index;
    const uint32_t offset = kind == MemoryOpKind::kWrite ? at_.bell : at_.answered;
    const uint64_t slot = number % at_.slots * at_.slot_bytes;
    out.push_back({reinterpret_cast<CUdeviceptr>(slots_[i]) + slot + offset, static_cast<uint32_t>(number)});
  }
  return out;
}

absl::Status Bell::Put(MemoryOpKind kind, uint32_t index, cudaStream_t stream) {
  if (kind_ == BellKind::kStreamMemory) {
    TANDEM_ASSIGN_OR_RETURN(const CUgraphNode node, PutMemoryOps(*driver_, kind, OpsOf(kind, index), stream));
    if (recording_ != nullptr) recording_->nodes.push_back({node, kind, index});
    return absl::OkStatus();
  }
  const cudaHostFn_t function =
      kind == MemoryOpKind::kWrite
          ? [](void* p) { static_cast<HostCall*>(p)->bell->RingFromHost(static_cast<HostCall*>(p)->index); }
          : [](void* p) { static_cast<HostCall*>(p)->bell->WaitFromHost(static_cast<HostCall*>(p)->index); };
  return ToStatus(cudaLaunchHostFunc(stream, function, HostCallOf(index)), "a host function");
}

Bell::HostCall* Bell::HostCallOf(uint32_t index) {
  while (host_calls_.size() <= index) {
    host_calls_.push_back(
        std::make_unique<HostCall>(HostCall{this, static_cast<uint32_t>(host_calls_.size())}));
  }
  return host_calls_[index].get();
}

// On a thread of the driver's, within a run: rings_ and first_ do not change.
void Bell::RingFromHost(uint32_t index) {
  for (size_t i = 0; i < rings_.size(); ++i) {
    const uint64_t number = first_[i] + index;
    shm::Signal(ControlOf(rings_[i], number).bell, static_cast<uint32_t>(number));
  }
}

void Bell::WaitFromHost(uint32_t index) {
  for (size_t i = 0; i < rings_.size(); ++i) {
    const auto number = static_cast<uint32_t>(first_[i]) + index;
    const std::atomic<uint32_t>& answered = ControlOf(rings_[i], first_[i] + index).answered.sequence;
    for (uint32_t looks = 0; static_cast<int32_t>(answered.load(std::memory_order_acquire) - number) < 0;) {
      if (shm::ReadOnce(*stop_) != 0) return;
      // Mostly an answer takes longer than a processor should be kept from others that want it.
      if (++looks % 1000 == 0) std::this_thread::yield();
    }
  }
}

absl::Status Bell::Renew(cudaGraphExec_t graph, const BellNodes& nodes) {
  for (const BellNodes::Node& n : nodes.nodes) {
    TANDEM_RETURN_IF_ERROR(SetMemoryOps(*driver_, graph, n.node, n.kind, OpsOf(n.kind, n.index)));
  }
  return absl::OkStatus();
}

absl::Status Bell::Finish(bool made_all, const absl::Status& why) {
  {
    const std::lock_guard lock(mutex_);
    running_ = false;
  }
  const uint32_t failed = made_all ? *failed_ : 0;
  absl::Status own;
  if (failed != 0) {
    own = calls_->AnswerStatus(failed - 1);
    // The slot holds the last answer: mostly that call failed for the same reason.
    if (absl::IsDataLoss(own)) own = calls_->AnswerStatus(run_calls_ - 1);
  }
  TANDEM_RETURN_IF_ERROR(calls_->EndRun(made_all, why));
  if (failed != 0 && own.ok()) {
    return absl::InternalError(absl::StrCat("the experts' call ", failed - 1, " of ", run_calls_, " failed"));
  }
  return own;
}

void Bell::Watch() {
  uint64_t run = 0, seen = 0;
  absl::Time since;
  bool late = false;
  int idle = 0;
  std::unique_lock lock(mutex_);
  while (!ending_) {
    if (!running_ && ++idle > kIdleLooks) {
      asleep_ = true;
      changed_.wait(lock, [this] { return ending_ || !asleep_; });
      idle = 0;
      continue;
    }
    if (running_) {
      idle = 0;
      const uint64_t progress = calls_->Progress();
      const absl::Time now = absl::Now();
      if (run != watched_run_ || (!late && progress != seen)) {
        run = watched_run_;
        late = false;
        seen = progress;
        since = now;
      } else if (late || now - since > calls_->call_timeout()) {
        late = true;  // until the run ends
        shm::WriteOnce(*stop_, 1U);
        calls_->Abort(absl::DeadlineExceededError("no answer in time"));
      }
    }
    // Long looks cost nothing; neither the end of a run nor the next one's beginning need wake this thread.
    changed_.wait_for(lock, kLook, [this] { return ending_; });
  }
}

absl::StatusOr<Bell::RoundTrip> Bell::Measure(uint64_t calls, int graphs, cudaStream_t stream) {
  BellNodes nodes;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "the bell's probe"));
  Record(&nodes);
  absl::Status status;
  for (uint64_t i = 0; i < calls && status.ok(); ++i) {
    RoutedCall call;
    call.index = static_cast<int64_t>(i);
    status = Ask(call, stream);
    if (status.ok()) status = Add(call, stream);
  }
  Record(nullptr);
  status.Update(ToStatus(cudaStreamEndCapture(stream, &graph), "the bell's probe"));
  if (status.ok()) status = ToStatus(cudaGraphInstantiate(&exec, graph, 0), "the bell's probe");
  std::vector<double> whole, host;
  for (int i = 0; i < graphs && status.ok(); ++i) {
    const double cpu = ThreadSeconds();
    const absl::Time begin = absl::Now();
    status = Begin(calls);
    if (!status.ok()) break;
    status = Renew(exec, nodes);
    if (status.ok()) status = ToStatus(cudaGraphLaunch(exec, stream), "the bell's probe");
    host.push_back(ThreadSeconds() - cpu);
    const absl::Status drained = ToStatus(cudaStreamSynchronize(stream), "the bell's probe");
    const absl::Status finished = Finish(status.ok(), status);
    whole.push_back(absl::ToDoubleMicroseconds(absl::Now() - begin));
    status.Update(drained);
    status.Update(finished);
  }
  if (exec != nullptr) cudaGraphExecDestroy(exec);
  if (graph != nullptr) cudaGraphDestroy(graph);
  TANDEM_RETURN_IF_ERROR(status);
  return RoundTrip{Median(whole) / static_cast<double>(calls), 1e6 * Median(host)};
}

}  // namespace tandem::attention::cuda
