#include "services/attention_gpu/backend/cuda/long_step.h"

#include <pthread.h>

#include <utility>

#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/device.h"

namespace tandem::attention::cuda {
namespace {

// Other experts, until somebody has had enough of it.
class UntilDropped : public RoutedExperts {
 public:
  UntilDropped(RoutedExperts& experts, const std::atomic<bool>& drop) : experts_(experts), drop_(drop) {}
  absl::Status Ask(const RoutedCall& call, cudaStream_t stream) override {
    return drop_ ? Dropped() : experts_.Ask(call, stream);
  }
  absl::Status Add(const RoutedCall& call, cudaStream_t stream) override {
    return drop_ ? Dropped() : experts_.Add(call, stream);
  }

 private:
  static absl::Status Dropped() { return absl::CancelledError("the step was dropped"); }
  RoutedExperts& experts_;
  const std::atomic<bool>& drop_;
};

}  // namespace

LongStep::LongStep(const model::ModelConfig& config, const DeviceWeights& weights, const LatentCache& cache,
                   int64_t max_tokens, int64_t cache_tokens, int device)
    : device_(device),
      work_(config, max_tokens, cache_tokens),
      forward_(config, weights, cache, work_) {}

LongStep::~LongStep() {
  Drop();
  if (end_ != nullptr) cudaEventDestroy(end_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

absl::Status LongStep::Allocate(int64_t tokens, int64_t pairs, int64_t pages) {
  int least = 0, greatest = 0;
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest), "a stream"));
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, least), "a stream"));
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaEventCreateWithFlags(&end_, cudaEventDisableTiming | cudaEventBlockingSync), "an event"));
  TANDEM_RETURN_IF_ERROR(work_.Allocate());
  return work_.Reserve(tokens, pairs, pages);
}

absl::Status LongStep::Begin(const StepBatch& batch, std::span<const float> frequencies, int32_t page_tokens,
                             Experts experts) {
  if (active()) return absl::FailedPreconditionError("a long step is under way");
  batch_ = batch;
  TANDEM_RETURN_IF_ERROR(work_.LayOut(batch_, frequencies, page_tokens));
  drop_ = false;
  result_.reset();
  thread_ = std::thread([this, experts = std::move(experts)] {
    pthread_setname_np(pthread_self(), "long-step");
    absl::Status status = Run(experts);
    const std::lock_guard lock(mutex_);
    result_ = std::move(status);
    changed_.notify_all();
  });
  return absl::OkStatus();
}

absl::Status LongStep::Run(const Experts& experts) {
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaSetDevice(device_), "the GPU"));
  const absl::StatusOr<RoutedExperts*> streamed = experts.begin();
  absl::Status status = streamed.status();
  if (status.ok() && *streamed == nullptr) status = absl::UnavailableError("prompts are not streamed");
  if (status.ok()) {
    UntilDropped until(**streamed, drop_);
    status = forward_.Layers(&until, /*defer=*/0, stream_);
  }
  // Also after an error: whatever is still on its way uses the buffers. Asleep, the CPUs are for the experts.
  status.Update(ToStatus(cudaEventRecord(end_, stream_), "a long step on the GPU"));
  status.Update(ToStatus(cudaEventSynchronize(end_), "a long step on the GPU"));
  const absl::Status end = experts.end();
  return status.ok() ? end : status;
}

std::optional<absl::Status> LongStep::Await(absl::Duration most) {
  {
    std::unique_lock lock(mutex_);
    const auto done = [this] { return result_.has_value(); };
    if (most == absl::InfiniteDuration()) {
      changed_.wait(lock, done);
    } else if (!changed_.wait_for(lock, absl::ToChronoNanoseconds(most), done)) {
      return std::nullopt;
    }
  }
  thread_.join();
  return std::exchange(result_, std::nullopt);
}

void LongStep::Drop() {
  if (!active()) return;
  drop_ = true;
  thread_.join();
  result_.reset();
}

}  // namespace tandem::attention::cuda
