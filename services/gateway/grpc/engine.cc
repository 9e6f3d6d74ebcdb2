#include "services/gateway/grpc/engine.h"

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/client_callback.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"
#include "common/rpc/channel.h"
#include "common/telemetry/log.h"
#include "tandem/v1/engine.grpc.pb.h"

namespace tandem::gateway {
namespace {

constexpr size_t kMaxMetadataBytes = 256 << 20;
// An engine that computes on every core may be late with an answer; it is not gone for that.
constexpr int kMissesAllowed = 3;
constexpr absl::Duration kMetadataTimeout = absl::Seconds(120);

class Call;

}  // namespace

struct Engine::Impl {
  std::string address;
  EngineOptions options;
  std::unique_ptr<v1::Engine::Stub> stub;
  std::atomic<int> calls{0};

  mutable std::mutex mutex;
  std::condition_variable changed;
  bool stopping = false;
  bool check_now = false;
  absl::Status status = absl::UnavailableError("not contacted yet");
  absl::Time lost_since = absl::InfinitePast();
  std::shared_ptr<const ModelContext> model;
  std::string instance_id;
  std::string backend;
  std::string degraded;
  std::set<const Call*> under_way;          // each leaves before it ends
  grpc::ClientContext* checking = nullptr;  // the monitor's call, to be cancelled at the end
  std::thread monitor;

  void Monitor();
  absl::Status Check();
  absl::StatusOr<std::string> ReadMetadata();
  void SetStatus(const absl::Status& now);
  void TellStalled();
  // False: stopping.
  bool BeginCheck(grpc::ClientContext* context, absl::Duration timeout);
  void EndCheck();
};

namespace {

// Lives until gRPC is done with it; EngineCall handles share it.
class Call final : public grpc::ClientReadReactor<v1::GenerateEvent>, public EngineCall {
 public:
  Call(v1::GenerateRequest request, std::shared_ptr<EngineListener> listener, uint64_t tag,
       std::function<void(const Call*)> on_done)
      : request_(std::move(request)),
        listener_(std::move(listener)),
        told_(listener_),
        tag_(tag),
        on_done_(std::move(on_done)) {}

  void Start(v1::Engine::Stub& stub, absl::Time deadline, std::shared_ptr<Call> self) {
    self_ = std::move(self);
    if (deadline != absl::InfiniteFuture()) context_.set_deadline(absl::ToChronoTime(deadline));
    stub.async()->Generate(&context_, &request_, this);
    StartRead(&event_);
    StartCall();
  }

  void Cancel() override { context_.TryCancel(); }

  bool SilentFor(absl::Duration time) const {
    return std::chrono::steady_clock::now() - latest_.load() >= absl::ToChronoNanoseconds(time);
  }
  std::pair<std::weak_ptr<EngineListener>, uint64_t> told() const { return {told_, tag_}; }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    latest_.store(std::chrono::steady_clock::now());
    listener_->OnEngineEvent(tag_, event_);
    StartRead(&event_);
  }

  void OnDone(const grpc::Status& status) override {
    const std::shared_ptr<Call> self = std::move(self_);  // ends with this function, at the earliest
    on_done_(this);
    const std::shared_ptr<EngineListener> listener = std::move(listener_);
    listener->OnEngineDone(tag_, rpc::FromGrpc(status));
  }

 private:
  grpc::ClientContext context_;
  v1::GenerateRequest request_;
  v1::GenerateEvent event_;
  std::shared_ptr<EngineListener> listener_;  // gRPC's threads' own
  const std::weak_ptr<EngineListener> told_;  // the same, for the engine's
  const uint64_t tag_;
  const std::function<void(const Call*)> on_done_;
  std::atomic<std::chrono::steady_clock::time_point> latest_ = std::chrono::steady_clock::now();
  std::shared_ptr<Call> self_;
};

}  // namespace

bool Engine::Impl::BeginCheck(grpc::ClientContext* context, absl::Duration timeout) {
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(timeout));
  std::lock_guard lock(mutex);
  if (stopping) return false;
  checking = context;
  return true;
}

void Engine::Impl::EndCheck() {
  std::lock_guard lock(mutex);
  checking = nullptr;
}

absl::StatusOr<std::string> Engine::Impl::ReadMetadata() {
  grpc::ClientContext context;
  if (!BeginCheck(&context, kMetadataTimeout)) return absl::CancelledError("stopping");
  std::string bytes;
  bool too_large = false;
  const auto reader = stub->ReadMetadata(&context, v1::ReadMetadataRequest());
  for (v1::MetadataChunk chunk; reader->Read(&chunk);) {
    if (bytes.size() + chunk.data().size() > kMaxMetadataBytes) {
      too_large = true;
      context.TryCancel();
      break;
    }
    bytes += chunk.data();
  }
  const grpc::Status status = reader->Finish();
  EndCheck();
  if (too_large) return absl::FailedPreconditionError("the engine's metadata is larger than 256 MiB");
  if (!status.ok()) return Annotate(rpc::FromGrpc(status), "reading the model's metadata");
  return bytes;
}

absl::Status Engine::Impl::Check() {
  v1::EngineDescription description;
  {
    grpc::ClientContext context;
    if (!BeginCheck(&context, options.check_timeout)) return absl::CancelledError("stopping");
    const grpc::Status status = stub->Describe(&context, v1::DescribeEngineRequest(), &description);
    EndCheck();
    if (!status.ok()) return rpc::FromGrpc(status);
  }
  bool new_instance, new_model;
  {
    std::lock_guard lock(mutex);
    new_instance = instance_id != description.instance_id();
    new_model = model == nullptr || model->limits().fingerprint != description.model_fingerprint() ||
                model->limits().context_length != description.context_length();
  }
  std::shared_ptr<const ModelContext> fresh;
  if (new_model) {
    TANDEM_ASSIGN_OR_RETURN(const std::string metadata, ReadMetadata());
    ModelLimits limits;
    limits.fingerprint = description.model_fingerprint();
    limits.name = description.model_name();
    limits.vocab_size = description.vocab_size();
    limits.context_length = description.context_length();
    absl::StatusOr<std::shared_ptr<const ModelContext>> made =
        ModelContext::Create(metadata, limits, options.model_id);
    if (!made.ok()) {
      return absl::FailedPreconditionError(
          absl::StrCat("its model cannot be served: ", made.status().message()));
    }
    fresh = std::move(*made);
  }
  if (new_instance || new_model) {
    spdlog::info("engine {}: {} ({}), context {}, batch {}, instance {}", address, description.model_name(),
                 description.backend(), description.context_length(), description.max_batch_size(),
                 description.instance_id());
  }
  std::lock_guard lock(mutex);
  instance_id = description.instance_id();
  backend = description.backend();
  if (degraded != description.degraded() && !description.degraded().empty()) {
    spdlog::warn("engine {}: requests wait: {}", address, description.degraded());
  }
  if (!degraded.empty() && description.degraded().empty()) spdlog::info("engine {}: goes on", address);
  degraded = description.degraded();
  if (fresh != nullptr) model = std::move(fresh);
  return absl::OkStatus();
}

void Engine::Impl::SetStatus(const absl::Status& now) {
  absl::Status before;
  {
    std::lock_guard lock(mutex);
    before = std::exchange(status, now);
    if (now.ok()) lost_since = absl::InfinitePast();
    if (before.ok() && !now.ok()) lost_since = absl::Now();
  }
  if (now.ok() && !before.ok()) spdlog::info("engine {}: serving", address);
  if (!now.ok() && now != before) {
    spdlog::warn("engine {}: not serving: {}", address, std::string(now.message()));
  }
}

// Whoever has another engine need not wait for this one.
void Engine::Impl::TellStalled() {
  std::vector<std::pair<std::weak_ptr<EngineListener>, uint64_t>> stalled;
  {
    std::lock_guard lock(mutex);
    if (degraded.empty()) return;
    for (const Call* call : under_way) {
      if (call->SilentFor(options.stalled)) stalled.push_back(call->told());
    }
  }
  for (const auto& [weak, tag] : stalled) {
    if (const std::shared_ptr<EngineListener> listener = weak.lock()) listener->OnEngineStalled(tag);
  }
}

void Engine::Impl::Monitor() {
  int misses = 0;
  while (true) {
    absl::Status now = Check();
    std::unique_lock lock(mutex);
    if (stopping) return;
    misses = absl::IsDeadlineExceeded(now) ? misses + 1 : 0;
    if (misses > 0 && misses <= kMissesAllowed && status.ok()) now = absl::OkStatus();
    lock.unlock();
    SetStatus(now);
    if (now.ok()) TellStalled();
    lock.lock();
    const absl::Duration pause = now.ok() ? options.poll_serving : options.poll_missing;
    changed.wait_for(lock, absl::ToChronoMilliseconds(pause), [this] { return stopping || check_now; });
    if (stopping) return;
    check_now = false;
  }
}

Engine::Engine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const std::string& address,
                                                       const EngineOptions& options,
                                                       const std::string& name) {
  absl::StatusOr<std::shared_ptr<grpc::Channel>> channel = rpc::Connect(address, options.tls, name);
  if (!channel.ok()) return Annotate(channel.status(), "engine " + address);
  auto impl = std::make_shared<Impl>();
  impl->address = address;
  impl->options = options;
  impl->stub = v1::Engine::NewStub(*channel);
  impl->monitor = std::thread([raw = impl.get()] { raw->Monitor(); });
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

Engine::~Engine() {
  {
    std::lock_guard lock(impl_->mutex);
    impl_->stopping = true;
    if (impl_->checking != nullptr) impl_->checking->TryCancel();
  }
  impl_->changed.notify_all();
  impl_->monitor.join();
}

const std::string& Engine::address() const { return impl_->address; }
int Engine::calls() const { return impl_->calls.load(); }

bool Engine::serving() const { return status().ok(); }

absl::Status Engine::status() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->status;
}

absl::Time Engine::lost_since() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->lost_since;
}

std::shared_ptr<const ModelContext> Engine::model() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->model;
}

std::string Engine::backend() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->backend;
}

std::string Engine::instance_id() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->instance_id;
}

std::string Engine::degraded() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->degraded;
}

std::shared_ptr<EngineCall> Engine::Generate(v1::GenerateRequest request, absl::Time deadline,
                                             std::shared_ptr<EngineListener> listener, uint64_t tag) {
  impl_->calls.fetch_add(1);
  auto call =
      std::make_shared<Call>(std::move(request), std::move(listener), tag, [impl = impl_](const Call* ended) {
        impl->calls.fetch_sub(1);
        std::lock_guard lock(impl->mutex);
        impl->under_way.erase(ended);
      });
  {
    std::lock_guard lock(impl_->mutex);
    impl_->under_way.insert(call.get());
  }
  call->Start(*impl_->stub, deadline, call);
  return call;
}

void Engine::Suspect(const absl::Status& status) {
  impl_->SetStatus(status);
  {
    std::lock_guard lock(impl_->mutex);
    impl_->check_now = true;
  }
  impl_->changed.notify_all();
}

}  // namespace tandem::gateway
