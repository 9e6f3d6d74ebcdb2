// A streamed step beside others: its layers run on a stream and a thread of their own, since the host has to
// wait in each of them for what the router has chosen; so the weights keep coming while other steps run. The
// GPU gives way to those.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/model/config.h"
#include "services/attention_gpu/backend/backend.h"
#include "services/attention_gpu/backend/cuda/forward.h"
#include "services/attention_gpu/backend/cuda/routed_experts.h"
#include "services/attention_gpu/backend/cuda/weights.h"
#include "services/attention_gpu/backend/cuda/workspace.h"

namespace tandem::attention::cuda {

// One step at a time. For one thread, the backend's.
class LongStep {
 public:
  // For steps of up to max_tokens. All references must outlive this.
  LongStep(const model::ModelConfig& config, const DeviceWeights& weights, const LatentCache& cache,
           int64_t max_tokens, int64_t cache_tokens, int device);
  ~LongStep();
  // Also room for the description of a step of so many tokens, angles of a token and pages: what grows later
  // waits for the device.
  absl::Status Allocate(int64_t tokens, int64_t pairs, int64_t pages);

  // Who computes the routed experts; both are called on the other thread.
  struct Experts {
    std::function<absl::StatusOr<RoutedExperts*>()> begin;
    std::function<absl::Status()> end;  // the device is done with the layers; what it says is theirs
  };
  // Begins the layers of the batch, whose pages must stay.
  absl::Status Begin(const StepBatch& batch, std::span<const float> frequencies, int32_t page_tokens,
                     Experts experts);
  bool active() const { return thread_.joinable(); }
  // How the layers went, if they are done within `most`: then it is active no more, the device is done with
  // them, and work() holds what they left. Only while it is active.
  std::optional<absl::Status> Await(absl::Duration most);
  // Gives up at the next layer, and waits for that.
  void Drop();

  const StepBatch& batch() const { return batch_; }
  Workspace& work() { return work_; }
  Forward& forward() { return forward_; }
  cudaStream_t stream() const { return stream_; }

 private:
  absl::Status Run(const Experts& experts);

  const int device_;
  Workspace work_;
  Forward forward_;
  StepBatch batch_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t end_ = nullptr;
  std::atomic<bool> drop_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<absl::Status> result_;  // under mutex_
  std::thread thread_;                  // last: uses all of the above
};

}  // namespace tandem::attention::cuda
